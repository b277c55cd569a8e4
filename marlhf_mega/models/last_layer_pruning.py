"""Last-layer pruning: everything after the last attention runs only on tokens the head reads.

The head reads hidden states at response tokens. Prompt tokens influence these only through keys
and values, so the last layer's feed-forward part and the final norm can skip them.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

Add = Callable[[Any, Tensor, float], Tensor]
"""Megatron's bias-dropout-add: the sum of a block's output and the residual stream."""


def can_prune(config: TransformerConfig) -> bool:
    """Return whether the last layer treats every token independently after its attention.

    It does not if sequence parallelism shards the tokens, a router counts them, or FP8 aligns them.
    """
    return not (config.sequence_parallel or config.num_moe_experts or config.fp8)


class LastLayerPruning:
    """Replaces the bias-dropout-add after the last layer's attention by one that selects tokens.

    The tokens arrive with the layer's own arguments, so that a layer recomputed in the backward
    pass finds those of its microbatch.
    """

    def __init__(self, layer: Any) -> None:
        """Install the replacement in a layer."""
        self._original: Callable[[bool, bool], Add] = layer.self_attn_bda
        self._wanted: Tensor | None = None
        layer.self_attn_bda = self
        layer.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, layer: Any, arguments: Any, named: dict[str, Any]) -> None:
        packing = named["packed_seq_params"]
        self._wanted = None if packing is None else packing.wanted

    def __call__(self, training: bool, fused: bool) -> Add:
        """Return Megatron's sum; if tokens are selected, its output is [wanted, 1, hidden]."""
        add, wanted = self._original(training, fused), self._wanted
        if wanted is None:
            return add

        def add_and_select(output: Any, residual: Tensor, dropout: float) -> Tensor:
            return add(output, residual, dropout).flatten(0, 1).index_select(0, wanted)[:, None]

        return add_and_select
