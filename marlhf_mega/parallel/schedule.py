"""A thin, typed wrapper of Megatron-Core's pipeline schedules.

A schedule walks the microbatches through the stages: `step(chunk, microbatch)` runs one model chunk
and, on the last stage, `loss(output, microbatch)` reduces its output. Megatron adds up the counts
that the losses return, and divides the gradients once by their sum over all ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from marlhf_mega.algorithm.losses import LossOutput

Microbatch = TypeVar("Microbatch")
Step = Callable[[Any, Microbatch], Tensor]
Loss = Callable[[Tensor, Microbatch], LossOutput]


def run_forward(
    chunks: Sequence[torch.nn.Module], microbatches: Sequence[Microbatch], step: Step[Microbatch]
) -> list[Tensor]:
    """Run the model on every microbatch without gradients. All ranks of a pipeline call it.

    Args:
        chunks: this rank's model chunks.
        microbatches: what `step` takes; every stage holds all of them.
        step: runs one chunk on one microbatch.

    Returns:
        The last stage's output of every microbatch, in order; empty on the other stages.
    """

    def collect(output: Tensor, *, non_loss_data: bool = False) -> Tensor:
        assert non_loss_data
        return output

    with torch.no_grad():
        return _run(
            chunks,
            microbatches,
            lambda chunk, microbatch: (step(chunk, microbatch), collect),
            forward_only=True,
            collect_non_loss_data=True,
        )


def run_forward_backward(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    step: Step[Microbatch],
    loss: Loss[Microbatch],
) -> list[LossOutput]:
    """Accumulate the gradient of sum(losses) / sum(counts) over all microbatches and data ranks.

    Args:
        chunks: this rank's model chunks, wrapped for data parallelism.
        microbatches: what `step` and `loss` take; every stage holds all of them.
        step: runs one chunk on one microbatch.
        loss: reduces the last stage's output; pure, no communication.

    Returns:
        The losses of this rank's microbatches on the last stage; empty on the other stages.
    """

    def reduce(microbatch: Microbatch, output: Tensor) -> tuple[Tensor, Tensor, LossOutput]:
        result = loss(output, microbatch)
        # Ranks that share sequences see the same losses, and each has a part of the gradient.
        counts = parallel_state.get_context_parallel_rank() == 0
        # The schedule changes the loss that it is given in place.
        return result.loss_sum.clone(), (result.count * counts).to(torch.int), result

    return _run(
        chunks,
        microbatches,
        lambda chunk, microbatch: (step(chunk, microbatch), partial(reduce, microbatch)),
        forward_only=False,
        collect_non_loss_data=False,
    )


def _run(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    forward_step: Callable[[Any, Microbatch], tuple[Tensor, Callable[..., Any]]],
    *,
    forward_only: bool,
    collect_non_loss_data: bool,
) -> list[Any]:
    def next_step(iterator: Iterator[Microbatch], chunk: torch.nn.Module) -> Any:
        return forward_step(chunk, next(iterator))

    results: list[Any] = get_forward_backward_func()(
        forward_step_func=next_step,
        data_iterator=[iter(microbatches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(microbatches),
        # Stages tell each other the shape of every message (variable_seq_lengths).
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
    )
    return results
