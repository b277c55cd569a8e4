"""Layers that Megatron-Core's local spec lacks: norm, attention and Gemma-2's normed projection."""

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional as F

from marlhf_mega.models.cpu_kernels import LONGEST_SCORES, rms_norm, short_causal_attention
from marlhf_mega.models.packing import Packing
from marlhf_mega.parallel.context import ContextShare
from marlhf_mega.parallel.linear import linear
from marlhf_mega.parallel.mesh import Group


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm in float32, for sequence parallelism and zero-centred weights too.

    Megatron's own wrapper of the torch norm refuses both.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = 0.0 if self.zero_centered else 1.0
        device = "cpu" if config.use_cpu_initialization else torch.get_default_device()
        self.weight = torch.nn.Parameter(
            torch.full((hidden_size,), start, dtype=config.params_dtype, device=device)
        )
        # Megatron sums such gradients over the ranks that share the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dim; the rounding order is that of each family's training code."""
        if hidden.dtype == torch.float32 or not self.zero_centered:
            scale = 1 + self.weight if self.zero_centered else self.weight
            if hidden.device.type == "cpu":
                return rms_norm(hidden, scale, self.eps)
            if hidden.dtype == torch.float32:
                return F.rms_norm(hidden, scale.shape, scale, self.eps)
        normed = F.rms_norm(hidden.float(), self.weight.shape, None, self.eps)
        if self.zero_centered:
            return (normed * (1 + self.weight.float())).to(hidden.dtype)
        return normed.to(hidden.dtype) * self.weight


class LocalColumnParallelLinear(ColumnParallelLinear):
    """Megatron's column-parallel projection with the products of `parallel.linear` on CPUs."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input.device.type != "cpu":
            return super()._forward_impl(input, weight, *args, **kwargs)
        return _cpu_forward(input, weight, **kwargs)


class LocalRowParallelLinear(RowParallelLinear):
    """Megatron's row-parallel projection with the products of `parallel.linear` on CPUs."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input.device.type != "cpu":
            return super()._forward_impl(input, weight, *args, **kwargs)
        return _cpu_forward(input, weight, **kwargs)


def _cpu_forward(
    rows: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Group | None,
    **_: Any,
) -> Tensor:
    """Take the arguments of Megatron's own product; the rest of them are about CUDA kernels."""
    if sequence_parallel:
        # Unlike Megatron's, this keeps the whole sequence for backward instead of a share.
        rows = gather_from_sequence_parallel_region(rows, group=tp_group)
    output = linear(rows, weight, sum_over=tp_group if allreduce_dgrad else None)
    return output if bias is None else output + bias


class PostNormRowParallelLinear(LocalRowParallelLinear):
    """A row-parallel projection whose summed output is normed (Gemma-2)."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.post_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Project, sum over the tensor-parallel ranks, norm."""
        output, bias = super().forward(hidden)
        return self.post_norm(output), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Add the norm, which every rank holds whole."""
        own = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        norm = {"post_norm.weight": self.post_norm.weight}
        return own | make_sharded_tensors_for_checkpoint(norm, prefix, {}, sharded_offsets)


class SdpaAttention(torch.nn.Module):
    """Causal attention through torch's scaled-dot-product kernels.

    Sequences are packed or right-padded, so no padding mask is needed: no real token sees padding.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        window: int | None = None,
        window_every: int = 1,
        **_: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        assert config.kv_channels is not None
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.softcap = softcap
        # layer_number counts from 1: with window_every=2 layers 1, 3, 5, ... slide.
        self.window = window if (layer_number - 1) % window_every == 0 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        packed_seq_params: Packing | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend causally.

        Args:
            query: [seq, batch, heads, head_dim]; seq is this rank's share where ranks share rows.
            key: [seq, batch, groups, head_dim].
            value: like key.
            attention_mask: always none: the order of positions is the mask.
            packed_seq_params: sequences that lie in one row (batch 1), or one in each; they do not
                see each other.

        Returns:
            [seq, batch, heads * head_dim].
        """
        assert attention_mask is None
        if packed_seq_params is None:
            return self._attend_last(query, key, value)
        if packed_seq_params.share is not None:
            return self._attend_shared(query, key, value, packed_seq_params.share)
        return packed_seq_params.apart(self._attend_last, query, key, value)

    def _attend_shared(
        self, query: Tensor, key: Tensor, value: Tensor, share: ContextShare
    ) -> Tensor:
        """Let this rank's queries see the keys and values of all ranks."""
        keys, values = share.gather(torch.cat((key, value), dim=-1)).chunk(2, dim=-1)
        queries = query.split([piece.end - piece.first for piece in share.pieces])
        parts = [
            self._attend_last(part, keys[piece.start : piece.end], values[piece.start : piece.end])
            for piece, part in zip(share.pieces, queries, strict=True)
        ]
        return torch.cat(parts)

    def _attend_last(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend causally; the queries are the last of the positions that the keys have."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        num_queries, num_keys = len(query), len(key)
        slides = self.window is not None and self.window < num_keys
        mask = None
        if slides or num_queries < num_keys:
            mask = causal_mask(
                num_keys, window=self.window, device=query.device, num_queries=num_queries
            )
        return self.attend(q, k, v, mask=mask).permute(2, 0, 1, 3).flatten(2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None) -> Tensor:
        """Attend with an explicit mask (True = visible), or causally without one.

        Args:
            q: [batch, heads, queries, head_dim].
            k: [batch, groups, keys, head_dim].
            v: like k.
            mask: bool, broadcastable to [batch, heads, queries, keys].

        Returns:
            [batch, heads, queries, head_dim].
        """
        if mask is None and self._is_short_on_cpu(q):
            return short_causal_attention(q, k, v, self.scale)
        grouped = q.shape[1] != k.shape[1]
        if self.softcap is None:
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=grouped,
            )
        if mask is None:
            mask = causal_mask(q.shape[2], window=None, device=q.device)
        if grouped:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = (q @ k.transpose(-1, -2)).mul_(self.scale)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        probabilities = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32)
        return probabilities.to(q.dtype) @ v

    def _is_short_on_cpu(self, q: Tensor) -> bool:
        return (
            q.device.type == "cpu"
            and q.dtype == torch.bfloat16
            and self.softcap is None
            and q.shape[2] <= LONGEST_SCORES
        )


def causal_mask(
    size: int, *, window: int | None, device: torch.device, num_queries: int | None = None
) -> Tensor:
    """Return bool [queries, size], True where query row may see key column.

    Args:
        size: number of keys.
        window: keys that a query sees at most, its own included; none: all before it.
        device: where the mask goes.
        num_queries: of the last positions; none: of all.
    """
    positions = torch.arange(size, device=device)
    distance = positions[-(num_queries or size) :, None] - positions
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)
