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

from marlhf_mega.models.lora import adapted
from marlhf_mega.models.packing import Packing
from marlhf_mega.parallel.context import ContextShare
from marlhf_mega.parallel.linear import linear
from marlhf_mega.parallel.mesh import Group
from marlhf_mega.platform.cpu.kernels import LONGEST_SCORES, rms_norm, short_causal_attention


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm in float32, also with sequence parallelism and zero-centred weights.

    Megatron's own wrapper of the torch norm supports neither.
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
        """Normalise the last dim, rounding in the order of each family's training code."""
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


class _OwnProductOnCpu:
    """A parallel projection of Megatron's that multiplies with `parallel.linear` on CPUs."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if input.device.type == "cpu":
            return _cpu_forward(input, weight, **kwargs)
        output: Tensor = super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        return output


class LocalColumnParallelLinear(_OwnProductOnCpu, ColumnParallelLinear):
    """A projection whose weight is sharded along the outputs."""


class LocalRowParallelLinear(_OwnProductOnCpu, RowParallelLinear):
    """A projection whose weight is sharded along the inputs."""


def _cpu_forward(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: Group | None,
    **_: Any,
) -> Tensor:
    """Multiply as Megatron's own product does; arguments left out concern CUDA kernels."""
    if sequence_parallel:
        # Unlike Megatron's, this keeps the whole sequence for the backward pass, not a shard of it.
        hidden = gather_from_sequence_parallel_region(hidden, group=tp_group)
    output = linear(hidden, weight, sum_over=tp_group if allreduce_dgrad else None)
    return output if bias is None else output + bias


class PostNormRowParallelLinear(LocalRowParallelLinear):
    """A row-parallel projection whose summed output is normed (Gemma-2)."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.post_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Project, sum over the tensor-parallel ranks, normalise."""
        output, bias = super().forward(hidden)
        return self.post_norm(adapted(self, output, hidden)), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Add the norm, which is replicated on every rank."""
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
        # layer_number counts from 1: with window_every=2 layers 1, 3, 5, ... have the window.
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
            query: [seq, batch, heads, head_dim], [seq/cp, ...] with context parallelism.
            key: [seq, batch, groups, head_dim].
            value: like key.
            attention_mask: always None; the mask follows from the order of positions.
            packed_seq_params: where sequences that are packed in one row (batch 1) end. No token
                attends to another sequence.

        Returns:
            [seq, batch, heads * head_dim], [seq/cp, ...] with context parallelism.
        """
        assert attention_mask is None
        if packed_seq_params is None:
            return self._attend_last(query, key, value)
        if packed_seq_params.share is not None:
            return self._attend_shared(query, key, value, packed_seq_params.share)
        return packed_seq_params.per_sequence(self._attend_last, query, key, value)

    def _attend_shared(
        self, query: Tensor, key: Tensor, value: Tensor, share: ContextShare
    ) -> Tensor:
        """Attend with this rank's queries to the keys and values of all context-parallel ranks."""
        keys, values = share.gather(torch.cat((key, value), dim=-1)).chunk(2, dim=-1)
        queries = query.split([piece.end - piece.first for piece in share.pieces])
        parts = [
            self._attend_last(part, keys[piece.start : piece.end], values[piece.start : piece.end])
            for piece, part in zip(share.pieces, queries, strict=True)
        ]
        return torch.cat(parts)

    def _attend_last(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend causally, with queries for the last of the keys' positions."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        num_queries, num_keys = len(query), len(key)
        is_windowed = self.window is not None and self.window < num_keys
        mask = None
        if is_windowed or num_queries < num_keys:
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
    """Return bool [queries, size], True where a query attends to a key.

    Args:
        size: number of keys.
        window: most keys that a query attends to, its own position included; None means all.
        device: of the mask.
        num_queries: queries, for the last positions; None means all positions.
    """
    positions = torch.arange(size, device=device)
    distance = positions[-(num_queries or size) :, None] - positions
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)
