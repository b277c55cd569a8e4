"""What the models say of responses, before anything is made of it."""

from dataclasses import dataclass

from torch import Tensor

from marlhf_mega.experience.segmentation import TokenEvidence


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What the models say of a replica's responses, [batch, response] each."""

    old_logprobs: Tensor
    """Of the policy at rollout, of the tokens that the sampler's filters kept."""
    full_logprobs: Tensor
    """The same before filters."""
    entropy: Tensor | None
    """None where the sampler's log-probs are taken."""
    ref_logprobs: Tensor | None
    """None without a reference."""
    values: Tensor | None
    """None without a critic."""
    dense: Tensor | None
    """None without dense rewards."""

    @property
    def grids(self) -> list[Tensor]:
        """All that there are."""
        return [grid for grid in vars(self).values() if grid is not None]

    @property
    def evidence(self) -> TokenEvidence:
        """What macro rules may read."""
        return TokenEvidence(
            old_logprobs=self.old_logprobs, ref_logprobs=self.ref_logprobs, entropy=self.entropy
        )

    def divergence(self, mask: Tensor) -> Tensor | None:
        """Return log p / p_reference of each token, None without a reference."""
        if self.ref_logprobs is None:
            return None
        return (self.full_logprobs - self.ref_logprobs) * mask
