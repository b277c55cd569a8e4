"""What generates responses, whatever does it: our decoder, another layout's, other engines."""

from collections.abc import Sequence
from typing import Protocol

from torch.nn import Module

from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.types import Rollout, RolloutOptions


class ResponseGenerator(Protocol):
    """Generates with the policy's present weights.

    `Generator` decodes with chunks at their own layout; `ReshardedGenerator` brings weights and
    prompts to another layout first.
    """

    @property
    def mesh(self) -> Mesh:
        """The layout that generates: its data-parallel ranks share the prompts."""

    @property
    def chunks(self) -> Sequence[Module]:
        """What holds the weights that generate."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        sample_indices: Sequence[int],
        options: RolloutOptions,
    ) -> Rollout:
        """Generate one response to each prompt of the caller's replica. All its ranks call it.

        Args:
            prompts: token ids, none empty.
            sample_indices: global index of every sample within the step.
            options: how they are drawn.

        Returns:
            The responses in the order of the prompts, the same on every rank of the replica.
        """
