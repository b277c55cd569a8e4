"""The mask policy of NLPO: an older copy of the policy, whose top-p the policy draws from."""

from collections.abc import Sequence

import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import StageModel, build_chunks
from marlhf_mega.parallel.mesh import Mesh


class MaskPolicy:
    """Holds the weights that the policy had after the last multiple of `rollout.mask_interval`."""

    def __init__(self, policy: Sequence[StageModel], config: Config, mesh: Mesh) -> None:
        """Build the copy; its weights come from the first `refresh`, or a checkpoint.

        Args:
            policy: this rank's chunks.
            config: of the run, with an interval.
            mesh: this rank's mesh.
        """
        interval = config.rollout.mask_interval
        assert interval is not None
        self._policy, self._interval = policy, interval
        self.chunks = build_chunks(
            config.model, config.precision, mesh, head="language", frozen=True
        )

    @torch.no_grad()
    def refresh(self, step: int) -> None:
        """Take the policy's weights if it is time, before the samples of a step are drawn."""
        if step % self._interval:
            return
        for own, chunk in zip(self.chunks, self._policy, strict=True):
            for weight, new in zip(own.parameters(), chunk.parameters(), strict=True):
                weight.copy_(new)
