"""What generation returns."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The responses of one data-parallel rank, in the order of the prompts it was given."""

    prompts: list[list[int]]
    """Token ids."""
    responses: list[list[int]]
    """Token ids, the end token included where there is one; never empty."""
    finished: list[bool]
    """Whether the response ended by itself rather than at the length limit."""
    sample_indices: list[int]
    """Global index of every sample within its step: the key of its random draws."""
    logprobs: Tensor
    """[batch, response] float32, zero on padding: log p of each sampled token under
    softmax(logits / temperature) over the whole vocabulary, before top-k and top-p."""

    def response_mask(self, device: torch.device) -> Tensor:
        """Return bool [batch, response], True at real tokens."""
        lengths = torch.tensor([len(r) for r in self.responses], device=device)
        return torch.arange(int(lengths.max()), device=device) < lengths[:, None]
