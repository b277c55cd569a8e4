"""What follows the last attention, run only on the tokens that the head reads.

A head reads states around response tokens. Prompt tokens matter to them through keys and values
alone, so the last layer's feed-forward part and the final norm can leave them out.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

Add = Callable[[Any, Tensor, float], Tensor]
"""Megatron's sum of a block's output and the residual stream."""


def can_cut(config: TransformerConfig) -> bool:
    """Say whether the last layer works on each token alone.

    Not where ranks share the tokens behind attention, a router counts them or FP8 aligns them.
    """
    return not (config.sequence_parallel or config.num_moe_experts or config.fp8)


class Tail:
    """Stands in the last layer for the sum behind attention.

    Which tokens go on comes with the layer's own arguments, so that a layer that is computed again
    in the backward pass finds those of its microbatch.
    """

    def __init__(self, layer: Any) -> None:
        """Take the place of the layer's own sum."""
        self._sum: Callable[[bool, bool], Add] = layer.self_attn_bda
        self._rows: Tensor | None = None
        layer.self_attn_bda = self
        layer.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, layer: Any, arguments: Any, named: dict[str, Any]) -> None:
        packing = named["packed_seq_params"]
        self._rows = None if packing is None else packing.wanted

    def __call__(self, training: bool, fused: bool) -> Add:
        """Return Megatron's sum; of [chosen, 1, hidden] where not all tokens go on."""
        add, rows = self._sum(training, fused), self._rows
        if rows is None:
            return add

        def add_chosen(output: Any, residual: Tensor, dropout: float) -> Tensor:
            return add(output, residual, dropout).flatten(0, 1).index_select(0, rows)[:, None]

        return add_chosen
