"""How far FP8 is from the weights' own precision: the same microbatch computed both ways."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.hardware import PrecisionConfig
from marlhf_mega.experience.types import Experience
from marlhf_mega.models.forward import Forward, logprob_forward
from marlhf_mega.models.fp8 import switch_off, without_fp8
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import max_over_world, sum_over_world
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import pipeline_forward_backward
from marlhf_mega.update.ppo import PpoMicrobatch, make_microbatches, policy_objective

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What one way of computing changes against another, the same on every rank."""

    logprob_gap: float
    """Mean absolute difference of response tokens' log-probs."""
    logprob_gap_max: float
    """Largest of them."""
    gradient_cosine: float
    """Between the two gradients of all weights; 1 where both are zero."""

    def exceeds(self, precision: PrecisionConfig) -> bool:
        """Whether it is more than the configuration allows, or not a number."""
        return not (
            self.gradient_cosine >= precision.fp8_min_cosine
            and self.logprob_gap <= precision.fp8_max_logprob_gap
        )

    def metrics(self) -> dict[str, float]:
        """Return it under the names of metrics."""
        return {f"policy/fp8_{name}": value for name, value in asdict(self).items()}


class Fp8Guard:
    """Compares FP8 with none every so many steps, and leaves it for good if asked to."""

    def __init__(self, config: Config, mesh: Mesh, chunks: Sequence[torch.nn.Module]) -> None:
        """Take what computes in FP8: this rank's chunks of all models that learn or generate."""
        self._config, self._mesh, self._chunks = config, mesh, list(chunks)
        self.has_left = False
        """Whether FP8 is off for the rest of the run."""

    def check(self, policy: TrainState, experience: Experience, *, step: int) -> dict[str, float]:
        """Compare the policy's next gradient with and without FP8 if it is due.

        All ranks call it before the update. No weight changes.

        Args:
            policy: the model that is about to learn.
            experience: this replica's samples; the first microbatch of the first minibatch counts.
            step: of the run, from 0.

        Returns:
            Metrics, empty if it is not due.
        """
        config, mesh = self._config, self._mesh
        interval = config.precision.fp8_check_interval
        if not interval or step % interval or self.has_left:
            return {}
        first = torch.arange(config.ppo.minibatch_size // mesh.dp_size)
        # An interleaved pipeline takes a multiple of its stages.
        count = mesh.pp_size if mesh.num_chunks > 1 else 1
        found = compare(
            policy,
            make_microbatches(experience, first, config, mesh)[:count],
            partial(policy_objective, config=config),
            forward=partial(
                logprob_forward,
                temperature=config.rollout.temperature,
                filtered=experience.kept is not None,
            ),
            other=partial(without_fp8, policy.chunks),
        )
        self.judge(found, step=step)
        return found.metrics()

    def judge(self, found: Divergence, *, step: int) -> None:
        """Warn of what is too much, and leave FP8 if the configuration says so."""
        precision = self._config.precision
        if not found.exceeds(precision):
            return
        leaves = precision.fp8_on_divergence == "leave"
        if self._mesh.rank == 0:
            logger.warning(
                "step %d: FP8 moves log-probs by %.3g nats a token (precision.fp8_max_logprob_gap="
                "%g) and gradients to a cosine of %.4f (precision.fp8_min_cosine=%g)%s",
                step,
                found.logprob_gap,
                precision.fp8_max_logprob_gap,
                found.gradient_cosine,
                precision.fp8_min_cosine,
                "; the rest of the run goes on without it" if leaves else "",
            )
        if leaves:
            self.leave()

    def leave(self) -> None:
        """Compute without FP8 from now on."""
        self.has_left = True
        switch_off(self._chunks)


def compare(
    state: TrainState,
    microbatches: Sequence[PpoMicrobatch],
    objective: Callable[[Tensor, PpoMicrobatch], LossOutput],
    *,
    forward: Forward,
    other: Callable[[], AbstractContextManager[None]],
) -> Divergence:
    """Run forward and backward passes twice, the second time inside `other`. All ranks call it.

    Args:
        state: the model; its gradients are lost, nothing else changes (but for the history that
            delayed scaling keeps).
        microbatches: what the losses take.
        objective: the loss.
        forward: runs one chunk on one microbatch.
        other: changes how the model computes for the length of a `with` block.
    """

    def passes() -> tuple[list[Tensor], list[Tensor]]:
        outputs: list[Tensor] = []

        def watched(output: Tensor, microbatch: PpoMicrobatch) -> LossOutput:
            outputs.append(output[0].detach().clone())
            return objective(output, microbatch)

        state.zero_grad()
        pipeline_forward_backward(state.chunks, microbatches, forward, watched)
        return outputs, [gradient.flatten() for gradient in state.gradient_shards()]

    logprobs, kept = passes()
    gradients = [gradient.clone() for gradient in kept]
    with other():
        other_logprobs, other_gradients = passes()
    gaps = [(a - b).abs() for a, b in zip(logprobs, other_logprobs, strict=True)]
    sums = [
        sum(float(gap.double().sum()) for gap in gaps),
        # On every rank that has log-probs, since their number cancels.
        sum(len(microbatch.batch.grid_rows) for microbatch in microbatches) if gaps else 0,
        _dot(gradients, other_gradients),
        _dot(gradients, gradients),
        _dot(other_gradients, other_gradients),
    ]
    device = state.gradient_buffers()[0].device
    total, count, product, square, other_square = sum_over_world(
        torch.tensor(sums, dtype=torch.float64, device=device)
    ).tolist()
    largest = torch.tensor(max((float(gap.max()) for gap in gaps), default=0.0), device=device)
    state.zero_grad()
    norms = math.sqrt(square) * math.sqrt(other_square)
    return Divergence(
        logprob_gap=total / max(count, 1.0),
        logprob_gap_max=max_over_world(largest).item(),
        gradient_cosine=product / norms if norms else float(square == other_square),
    )


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float(torch.dot(a, b)) for a, b in zip(left, right, strict=True))
