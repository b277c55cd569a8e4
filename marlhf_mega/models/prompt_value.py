"""What a prompt is worth: a small network on the states of a frozen model (arXiv 2305.14718)."""

import math

import torch
from torch import Tensor

NUM_HEADS = 8


class PromptValue(torch.nn.Module):
    """Attention of one learned query over a prompt's states, a linear map, and bounds.

    value = low + (high - low) * sigmoid(w . Attention(query, states) + b)

    The head of the paper's code, which has low = 0 and drops out 0.1 of the states; here values do
    not depend on a draw. All ranks that give the same seed hold the same weights.
    """

    def __init__(
        self, hidden_size: int, *, low: float, high: float, seed: int, device: torch.device
    ) -> None:
        """Draw the first weights.

        Args:
            hidden_size: width of the states.
            low: every value is above it, or equal.
            high: every value is below it, or equal.
            seed: of the weights.
            device: where the states are.
        """
        super().__init__()
        self.low, self.high = low, high
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.query = torch.nn.Parameter(torch.randn(hidden_size))
            heads = math.gcd(NUM_HEADS, hidden_size)
            self.attention = torch.nn.MultiheadAttention(hidden_size, heads, batch_first=True)
            self.output = torch.nn.Linear(hidden_size, 1)
        self.float().to(device)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return float32 [batch].

        Args:
            states: [batch, prompt, hidden] float32, of the last layer.
            mask: [batch, prompt] bool, real tokens; a row without any gives NaN.
        """
        query = self.query.expand(len(states), 1, -1)
        found, _ = self.attention(query, states, states, key_padding_mask=~mask, need_weights=False)
        share = self.output(found)[:, 0, 0].sigmoid()
        return self.low + (self.high - self.low) * share
