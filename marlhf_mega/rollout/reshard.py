"""Generate at another layout: fetch the weights, assign the prompts anew, bring answers back."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from marlhf_mega.parallel.collectives import gather_objects
from marlhf_mega.parallel.mesh import Mesh, use_mesh
from marlhf_mega.rollout.assignment import gather_rollouts, select
from marlhf_mega.rollout.protocol import ResponseGenerator
from marlhf_mega.rollout.types import Rollout, RolloutOptions


class ReshardedGenerator:
    """A generator for callers at the training layout; it returns what that one would."""

    def __init__(
        self,
        generator: ResponseGenerator,
        *,
        training: Mesh,
        weights: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Take a second set of weights.

        Args:
            generator: at the rollout's layout, with weights of its own.
            training: the callers' layout, of the same world.
            weights: fills it with the weights that are trained for the length of a `with` block;
                all ranks enter it together.
        """
        self.chunks, self.mesh = generator.chunks, generator.mesh
        self.training, self.weights = training, weights
        self._generator = generator

    def generate(
        self,
        prompts: Sequence[list[int]],
        sample_indices: Sequence[int],
        options: RolloutOptions,
    ) -> Rollout:
        """Generate as `Generator.generate` does, with `slots` meant for a replica of the rollout.

        All ranks of the world call it, with the prompts of their training replica.
        """
        own = list(zip(sample_indices, prompts, strict=True))
        parts = gather_objects(own, self.training.groups.dp)
        everything = sorted((row for part in parts for row in part), key=lambda row: row[0])
        assigned = everything[self.mesh.dp_rank :: self.mesh.dp_size]
        with self.weights(), use_mesh(self.mesh):
            rollout = self._generator.generate(
                [prompt for _, prompt in assigned], [sample for sample, _ in assigned], options
            )
        return select(gather_rollouts(rollout, self.mesh), sample_indices, self.mesh.device)
