"""Generate at a layout of its own: fetch the weights, deal the prompts anew, bring answers back."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from marlhf_mega.parallel.collectives import gather_objects_over_data
from marlhf_mega.parallel.mesh import Mesh, in_force
from marlhf_mega.rollout.deal import gather_rollouts, pick
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.types import Rollout


class ReshardedGenerator:
    """A `Generator` whose callers stand at the training layout; what it returns is the same."""

    def __init__(
        self,
        generator: Generator,
        *,
        training: Mesh,
        weights: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Take a second set of weights.

        Args:
            generator: at the rollout's layout, with chunks of its own.
            training: the callers' layout, of the same world.
            weights: holds the weights that are trained in those chunks for the length of a `with`
                block; all ranks enter it together.
        """
        self.chunks, self.mesh = generator.chunks, generator.mesh
        self.training, self.weights = training, weights
        self._generator = generator

    def generate(
        self,
        prompts: Sequence[list[int]],
        sample_indices: Sequence[int],
        *,
        rule: SamplingRule,
        max_response_tokens: int | Sequence[int],
        seed: int,
        step: int,
        slots: int | None = None,
        stop_at_eos: bool = True,
    ) -> Rollout:
        """Generate as `Generator.generate` does, with `slots` meant for a replica of the rollout.

        All ranks of the world call it, with the prompts of their training replica.
        """
        limits = max_response_tokens
        if isinstance(limits, int):
            limits = [limits] * len(prompts)
        own = list(zip(sample_indices, prompts, limits, strict=True))
        parts = gather_objects_over_data(own, self.training)
        everything = sorted((row for part in parts for row in part), key=lambda row: row[0])
        dealt = everything[self.mesh.dp_rank :: self.mesh.dp_size]
        with self.weights(), in_force(self.mesh):
            rollout = self._generator.generate(
                [prompt for _, prompt, _ in dealt],
                [sample for sample, _, _ in dealt],
                rule=rule,
                max_response_tokens=[limit for _, _, limit in dealt],
                seed=seed,
                step=step,
                slots=slots,
                stop_at_eos=stop_at_eos,
            )
        return pick(gather_rollouts(rollout, self.mesh), sample_indices, self.mesh.device)
