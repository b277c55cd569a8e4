"""What follows the last attention, run only on the tokens that the head reads.

A head reads states around response tokens. Prompt tokens matter to them through keys and values
alone, so the last layer's feed-forward part and the final norm can leave them out.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

Add = Callable[[Any, Tensor, float], Tensor]
"""Megatron's sum of a block's output and the residual stream."""


def can_cut(config: TransformerConfig) -> bool:
    """Say whether the last layer works on each token alone, and only once.

    Not where ranks share the tokens behind attention, a router counts them, FP8 aligns them, or
    the layer runs again in the backward pass, when other tokens are wanted.
    """
    return not (
        config.sequence_parallel
        or config.num_moe_experts
        or config.fp8
        or config.recompute_granularity == "full"
    )


class Tail:
    """Stands in the last layer for the sum behind attention."""

    def __init__(self, layer: Any) -> None:
        """Take the place of the layer's own sum."""
        self._sum: Callable[[bool, bool], Add] = layer.self_attn_bda
        self._rows: Tensor | None = None
        layer.self_attn_bda = self

    @contextmanager
    def only(self, rows: Tensor) -> Iterator[None]:
        """Let what follows see some tokens for the length of a `with` block.

        Args:
            rows: [chosen] int64, of [seq * batch]; if there are none it sees the first.
        """
        self._rows = rows if len(rows) else rows.new_zeros(1)
        try:
            yield
        finally:
            self._rows = None

    def __call__(self, training: bool, fused: bool) -> Add:
        """Return Megatron's sum; inside `only` of [chosen, 1, hidden]."""
        add, rows = self._sum(training, fused), self._rows
        if rows is None:
            return add

        def add_chosen(output: Any, residual: Tensor, dropout: float) -> Tensor:
            return add(output, residual, dropout).flatten(0, 1).index_select(0, rows)[:, None]

        return add_chosen
