"""The head of a reward model with a latent per user (VPL): networks on states of last tokens."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional as F

from marlhf_mega.algorithm.reward_models import attend_pairs, draw_latent
from marlhf_mega.parallel.mesh import Mesh

SLOPE = 0.2
"""Of the activations below zero, as in the released code."""


class Float32Linear(torch.nn.Linear):
    """A linear map that computes in float32, whatever its weights are kept in."""

    def forward(self, states: Tensor) -> Tensor:
        """Return [..., out] for [..., in]."""
        return F.linear(states.float(), self.weight.float(), self.bias.float())


class LatentNetworks(torch.nn.Module):
    """A user's preferences -> a latent; a state and a latent -> a score.

    Variational preference learning, Poddar et al. 2024, arXiv 2408.10075, with the shapes of its
    released code: perceptrons of three layers, all as wide as the latent.
    """

    def __init__(self, hidden: int, size: int, **kind: Any) -> None:
        """Allocate the weights.

        Args:
            hidden: size of a state.
            size: of the latent.
            kind: dtype and device.
        """
        super().__init__()
        self.pair = _perceptron((2 * hidden, size, size, size), kind)
        self.query, self.key, self.value = (Float32Linear(size, size, **kind) for _ in range(3))
        self.mean, self.log_variance = (Float32Linear(size, size, **kind) for _ in range(2))
        self.reward = _perceptron((hidden + size, size, size, 1), kind)

    def forward(
        self, states: Tensor, context: Tensor, mask: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score the responses of pairs by what their users have preferred.

        Args:
            states: [2, pairs, hidden] at the last tokens of chosen and rejected responses.
            context: [pairs, context, 2, hidden], such states of other pairs of the same user.
            mask: bool [pairs, context], True on real ones.
            noise: [pairs, latent], standard normal; none: the latent is its mean.

        Returns:
            float32 scores [2, pairs]; mean and log-variance of the latents, [pairs, latent].
        """
        pairs = self.pair(context.flatten(2))
        preferred = attend_pairs(self.query(pairs), self.key(pairs), self.value(pairs), mask)
        mean = self.mean(preferred).clamp(-1, 1)
        log_variance = self.log_variance(preferred).clamp(-1, 1)
        latent = mean if noise is None else draw_latent(mean, log_variance, noise)
        both = torch.cat((states.float(), latent.expand(2, *latent.shape)), dim=-1)
        return self.reward(both)[..., 0], mean, log_variance


class LatentHead(torch.nn.Module):
    """`LatentNetworks` in the place of a scalar head, replicated on the tensor-parallel ranks.

    Checkpoints of the training run have it; no Hugging Face model does.
    """

    def __init__(self, config: Any, mesh: Mesh, *, size: int) -> None:
        super().__init__()
        kind = {"dtype": config.params_dtype, "device": mesh.device}
        self.latent = LatentNetworks(config.hidden_size, size, **kind)
        self.weight = None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Describe the weights as whole on every rank."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets
        )


def _perceptron(sizes: Sequence[int], kind: dict[str, Any]) -> torch.nn.Sequential:
    first, second, third = (Float32Linear(*shape, **kind) for shape in pairwise(sizes))
    return torch.nn.Sequential(
        first, torch.nn.LeakyReLU(SLOPE), second, torch.nn.LeakyReLU(SLOPE), third
    )
