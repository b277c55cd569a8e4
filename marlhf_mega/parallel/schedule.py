"""A thin, typed wrapper of Megatron-Core's pipeline schedules.

A schedule takes the microbatches through the stages: `forward(chunk, batch)` runs one model chunk
and, on the last stage, `loss(output, microbatch)` reduces its output. Megatron sums the counts that
the losses return over all ranks and divides the gradients by that sum once.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from marlhf_mega.algorithm.losses import LossOutput


class HasBatch(Protocol):
    """What a loss takes: the sequences, and whatever else it needs beside them."""

    @property
    def batch(self) -> Any:
        """What `forward` takes."""


Batch = TypeVar("Batch")
_Microbatch = TypeVar("_Microbatch", bound=HasBatch)


def pipeline_forward(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    forward: Callable[[Any, Batch], Tensor],
) -> list[Tensor]:
    """Run the model on every microbatch without gradients. All ranks of a pipeline call it.

    Args:
        chunks: this rank's model chunks.
        batches: what `forward` takes; every stage holds all of them.
        forward: runs one chunk on one microbatch.

    Returns:
        On the last stage the output of every microbatch, in order; empty on the other stages.
    """

    def collect(output: Tensor, *, non_loss_data: bool = False) -> Tensor:
        assert non_loss_data
        return output

    def forward_step(iterator: Iterator[Batch], chunk: torch.nn.Module) -> Any:
        return forward(chunk, next(iterator)), collect

    arguments = _arguments(chunks, batches, batches, training=False)
    with torch.no_grad():
        outputs: list[Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step, **arguments
        )
    return outputs


def pipeline_forward_backward(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[_Microbatch],
    forward: Callable[[Any, Any], Tensor],
    loss: Callable[[Tensor, _Microbatch], LossOutput],
) -> list[LossOutput]:
    """Accumulate the gradient of sum(losses) / sum(counts), over microbatches and data parallelism.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism.
        microbatches: what `loss` takes; every stage holds all of them.
        forward: runs one chunk on a microbatch's `batch`.
        loss: reduces the last stage's output; pure, no communication.

    Returns:
        On the last stage the losses of this rank's microbatches; empty on the other stages.
    """

    def reduce(microbatch: _Microbatch, output: Tensor) -> tuple[Tensor, Tensor, LossOutput]:
        result = loss(output, microbatch)
        # Context-parallel ranks see equal losses, and each has a part of the gradient.
        counts = parallel_state.get_context_parallel_rank() == 0
        # The schedule changes the loss in place.
        return result.loss_sum.clone(), (result.count * counts).to(torch.int), result

    def forward_step(iterator: Iterator[_Microbatch], chunk: torch.nn.Module) -> Any:
        microbatch = next(iterator)
        return forward(chunk, microbatch.batch), partial(reduce, microbatch)

    batches = [microbatch.batch for microbatch in microbatches]
    losses: list[LossOutput] = get_forward_backward_func()(
        forward_step_func=forward_step,
        **_arguments(chunks, microbatches, batches, training=True),
    )
    return losses


def _arguments(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Any],
    batches: Sequence[Any],
    *,
    training: bool,
) -> dict[str, Any]:
    models: list[Any] = [getattr(chunk, "module", chunk) for chunk in chunks]
    shapes = {models[0].row_shape(batch) for batch in batches}
    for model in models:
        # Stages tell each other the shape of every message, and wait for it, unless all know it.
        model.config.variable_seq_lengths = len(shapes) > 1
    seq, batch_size = max(shapes, default=(1, 1))
    return {
        "data_iterator": [iter(microbatches) for _ in chunks],
        "model": list(chunks),
        "num_microbatches": len(microbatches),
        "seq_length": seq,
        "micro_batch_size": batch_size,
        "forward_only": not training,
        "collect_non_loss_data": not training,
    }
