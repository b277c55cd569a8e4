"""Router replay: in training, tokens go to the experts that they went to in the rollout.

A router chooses the experts of the largest logits. Sampler and trainer round differently, and where
two logits are close they choose different experts: the log-probs of such tokens differ by far more
than by rounding. With the rollout's choice replayed, the trainer weighs the same experts, by its
own logits (R3, arXiv 2510.11370).

Megatron-Core's `RouterReplay` has one list for the routers of all models, and replays in the order
of the calls. Here the choice comes with the microbatch, so that a layer that is recomputed in the
backward pass finds it, and only a pass that asks for it replays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from marlhf_mega.config.limits import expert_bytes

NOT_RECORDED = 0
"""Where a token's choice is free; an expert's entry is its number plus one."""

Choice = Callable[..., tuple[Tensor, Tensor]]
"""Megatron's own: scores and further settings to values and experts, [tokens, top_k] each."""


def record_dtype(num_experts: int) -> torch.dtype:
    """Return the format of recorded choices."""
    return {1: torch.uint8, 2: torch.int16}[expert_bytes(num_experts)]


class Replay:
    """What a layer's router asks for the experts of its tokens."""

    def __init__(self, layer: Any, index: int) -> None:
        """Install it in a layer with experts.

        Args:
            layer: Megatron's.
            index: of the layer in its chunk.
        """
        self.records = False
        """Whether to keep the choice of each pass in `chosen`."""
        self.chosen: Tensor | None = None
        """[tokens, top_k] int64 of the last pass."""
        self.num_differing: Tensor | None = None
        """Tokens that the router would have sent elsewhere than the replayed choice."""
        self.num_replayed: Tensor | None = None
        self.layer_number: int | None = None
        """Set by newer versions of Megatron-Core."""
        self._index = index
        self._wanted: Tensor | None = None
        layer.mlp.router.router_replay = self
        layer.register_forward_pre_hook(self._take, with_kwargs=True)
        layer.register_forward_hook(self._leave)

    def _take(self, layer: Any, arguments: Any, named: dict[str, Any]) -> None:
        routing = getattr(named.get("packed_seq_params"), "routing", None)
        self._wanted = None if routing is None else routing[self._index]

    def _leave(self, *_: Any) -> None:
        self._wanted = None

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Choice | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the experts of each token and their scores; Megatron's router calls it.

        Args:
            scores: [tokens, experts].
            topk: experts of a token.
            num_groups: of experts, for the default.
            group_topk: of those a token may go to, for the default.
            default_compute_topk: chooses by the scores.
        """
        assert default_compute_topk is not None
        values, own = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        if self.records:
            self.chosen = own
        if self._wanted is None:
            return values, own
        recorded = self._wanted != NOT_RECORDED
        experts = torch.where(recorded, self._wanted.long() - 1, own)
        self._count(own, experts, recorded)
        return scores.gather(1, experts), experts

    def _count(self, own: Tensor, experts: Tensor, recorded: Tensor) -> None:
        differs = (own.sort(1).values != experts.sort(1).values).any(1)
        counts = differs.sum(), recorded[:, 0].sum()
        if self.num_differing is None or self.num_replayed is None:
            self.num_differing, self.num_replayed = counts
        else:
            self.num_differing += counts[0]
            self.num_replayed += counts[1]

    def drain(self) -> tuple[Tensor, Tensor] | None:
        """Return both counts since the last call; None without any."""
        differing, replayed = self.num_differing, self.num_replayed
        self.num_differing = self.num_replayed = None
        return None if differing is None or replayed is None else (differing, replayed)


def replays_of(chunk: nn.Module) -> list[Replay]:
    """Return those of a chunk's layers, in order; none without experts."""
    whole: Any = getattr(chunk, "module", chunk)
    return [
        layer.mlp.router.router_replay
        for layer in whole.decoder.layers
        if hasattr(layer.mlp, "router")
    ]


def drain(chunks: Sequence[nn.Module]) -> tuple[Tensor, Tensor] | None:
    """Return the summed counts of this rank's layers, see `Replay.drain`."""
    counts = [c for chunk in chunks for r in replays_of(chunk) if (c := r.drain()) is not None]
    if not counts:
        return None
    differing, replayed = zip(*counts, strict=True)
    return torch.stack(differing).sum(), torch.stack(replayed).sum()
