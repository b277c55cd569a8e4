"""One stage chunk run token by token: the training modules, around a cache of keys and values.

Every norm and projection is the module that trains, so rollout and training cannot drift apart;
only attention is arranged differently. Keys are cached rotated.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn import functional as F

from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.layers import SdpaAttention, causal_mask
from marlhf_mega.models.rope import rotation_angles
from marlhf_mega.rollout.products import packed_projections


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """Distinct new prompts, right-padded, for neighbouring slots that may share them."""

    tokens: Tensor
    """[batch, seq] int64."""
    rows: Tensor
    """[slots] int64: the row of `tokens` that each new slot answers."""
    lengths: Tensor
    """[slots] int64: of each slot's prompt."""
    first_slot: int


@dataclass(frozen=True, kw_only=True)
class Decode:
    """One more token for the first slots."""

    tokens: Tensor
    """[batch, 1] int64."""
    positions: Tensor
    """[batch] int64: where the tokens stand, which is how many the cache holds."""
    longest: int
    """Highest position plus one."""


Work = Prefill | Decode


class ChunkDecoder:
    """Runs one model chunk on new tokens and keeps its keys and values."""

    def __init__(self, chunk: StageModel, *, num_slots: int, max_tokens: int) -> None:
        """Allocate the cache and tabulate the rotations.

        Args:
            chunk: the model chunk.
            num_slots: sequences in flight.
            max_tokens: longest sequence.
        """
        config, model = chunk.config, chunk.model
        assert config.num_query_groups is not None
        assert config.kv_channels is not None
        self.chunk = chunk
        groups = max(1, config.num_query_groups // config.tensor_model_parallel_size)
        # Room for the rows that only fill a matrix product up; see `_aligned`.
        sizes = (_round_up(n, chunk.row_multiple) for n in (num_slots, max_tokens))
        num_slots, max_tokens = sizes
        shape = (len(chunk.decoder.layers), 2, num_slots, groups, max_tokens, config.kv_channels)
        device = chunk.rotary_speeds.device
        self.cache = torch.zeros(shape, dtype=config.params_dtype, device=device)
        self.slots = torch.arange(num_slots, device=device)
        angles = rotation_angles(chunk.rotary_speeds, torch.arange(max_tokens, device=device))
        self.cos = angles.cos().to(config.params_dtype)[:, None]
        self.sin = angles.sin().to(config.params_dtype)[:, None]
        self.attentions = [
            SdpaAttention(
                config,
                layer.layer_number,
                AttnMaskType.causal,
                softmax_scale=config.softmax_scale,
                softcap=model.attention_softcap,
                window=model.sliding_window,
                window_every=model.sliding_window_every,
            )
            for layer in chunk.decoder.layers
        ]

    def move_slot(self, source: int, target: int) -> None:
        """Copy a sequence's keys and values to another slot."""
        self.cache[:, :, target] = self.cache[:, :, source]

    def run(self, work: Work, hidden: Tensor | None) -> Tensor:
        """Advance the chunk.

        Args:
            work: what is new.
            hidden: [seq, batch, hidden] from the chunk before; none on the first.

        Returns:
            [seq, batch, hidden] for the next chunk; on the last one the normed states from which
            the next tokens follow, [slots, hidden].
        """
        seq, batch = work.tokens.shape[1], len(work.tokens)
        work = _aligned(work, self.chunk.row_multiple)
        more = (work.tokens.shape[1] - seq, len(work.tokens) - batch)
        if hidden is None:
            hidden = self.chunk.embed(work.tokens)
        elif any(more):
            hidden = F.pad(hidden, (0, 0, 0, more[1], 0, more[0]))
        if isinstance(work, Prefill):
            positions = torch.arange(work.tokens.shape[1], device=hidden.device)[:, None]
        else:
            positions = work.positions[None]
        cos, sin = self.cos[positions], self.sin[positions]
        masks = _masks(work, [a.window for a in self.attentions])
        for index, layer in enumerate(self.chunk.decoder.layers):
            with self._precision(layer):
                normed = layer.input_layernorm(hidden)
                query, key, value = layer.self_attention.get_query_key_value_tensors(normed, None)
                query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
                attention = self.attentions[index]
                context = self._attend(index, query, key, value, work, masks[attention.window])
                hidden = hidden + layer.self_attention.linear_proj(context)[0]
                hidden = hidden + layer.mlp(layer.pre_mlp_layernorm(hidden))[0]
        if any(more):
            hidden = hidden[:seq, :batch]
        if not self.chunk.post_process:
            return hidden
        ends = hidden[work.lengths - 1, work.rows] if isinstance(work, Prefill) else hidden[0]
        last: Tensor = self.chunk.decoder.final_layernorm(ends)
        return last

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits of this rank's real columns, [batch, vocab/tp] (at least one)."""
        shard, cap = self.chunk.vocab_shard, self.chunk.model.logits_softcap
        if shard.num_real == 0:
            return hidden.new_full((len(hidden), 1), -torch.inf, dtype=torch.float32)
        padded, _ = self.chunk.output_layer(hidden, weight=self.chunk.head_weight())
        logits = padded[:, : shard.num_real].float()
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _precision(self, layer: Any) -> AbstractContextManager[None]:
        """Return FP8 as it trains; but delayed scaling would count these passes in its history."""
        if self.chunk.config.fp8_recipe == "delayed":
            return nullcontext()
        context: AbstractContextManager[None] = get_fp8_context(
            self.chunk.config, layer.layer_number - 1
        )
        return context

    def _attend(
        self, index: int, query: Tensor, key: Tensor, value: Tensor, work: Work, mask: Tensor | None
    ) -> Tensor:
        """Store the new keys and values, attend: [seq, batch, heads, d] -> [seq, batch, h * d]."""
        attention, (keys, values) = self.attentions[index], self.cache[index]
        batch = query.shape[1]
        if isinstance(work, Prefill):
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            new = slice(work.first_slot, work.first_slot + len(work.rows))
            keys[new, :, : k.shape[2]] = k[work.rows]
            values[new, :, : v.shape[2]] = v[work.rows]
            return attention.attend(q, k, v, mask=mask).permute(2, 0, 1, 3).flatten(2)
        slots = self.slots[:batch]
        keys[slots, :, work.positions] = key[0]
        values[slots, :, work.positions] = value[0]
        k, v = keys[:batch, :, : work.longest], values[:batch, :, : work.longest]
        # Heads that share keys go as queries of one head: each key is read once.
        q = query[0].unflatten(1, (k.shape[1], -1))
        return attention.attend(q, k, v, mask=mask).reshape(1, batch, -1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _aligned(work: Work, multiple: int) -> Work:
    """Fill up to the rows that FP8 products take: longer prompts, or tokens for free slots.

    Nothing reads what they leave in the cache: it lies behind the prompts' ends, or where the
    next prompt of the slot will be written.
    """
    batch, seq = work.tokens.shape
    if isinstance(work, Prefill):
        missing = -seq % multiple
        return replace(work, tokens=F.pad(work.tokens, (0, missing))) if missing else work
    missing = -batch % multiple
    if not missing:
        return work
    tokens = F.pad(work.tokens, (0, 0, 0, missing))
    return replace(work, tokens=tokens, positions=F.pad(work.positions, (0, missing)))


def _masks(work: Work, windows: list[int | None]) -> dict[int | None, Tensor | None]:
    """Build each distinct layer mask once: none where plain causal attention will do."""
    masks: dict[int | None, Tensor | None] = {}
    for window in set(windows):
        if isinstance(work, Prefill):
            size = work.tokens.shape[1]
            sees_all = window is None or window >= size
            masks[window] = (
                None if sees_all else causal_mask(size, window=window, device=work.tokens.device)
            )
            continue
        columns = torch.arange(work.longest, device=work.positions.device)
        distance = work.positions[:, None] - columns
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        masks[window] = visible[:, None, None, :]
    return masks


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@contextmanager
def generating(chunks: list[StageModel]) -> Iterator[None]:
    """Evaluate without gradients and sequence parallelism, weights packed; then restore all.

    One new token a sequence cannot be shared along the sequence.
    """
    switched = [
        (module, name)
        for chunk in chunks
        for module in chunk.modules()
        for name in ("sequence_parallel", "reduce_scatter_embeddings")
        if getattr(module, name, False) is True
    ]
    configs = {
        id(c): c for c in (m.config for ch in chunks for m in ch.modules() if hasattr(m, "config"))
    }
    sequence_parallel = chunks[0].config.sequence_parallel
    was_training = chunks[0].training
    try:
        for module, name in switched:
            setattr(module, name, False)
        for config in configs.values():
            config.sequence_parallel = False
        for chunk in chunks:
            chunk.eval()
            # Transformer Engine must not use weights in FP8 that are older than the last update.
            chunk.set_is_first_microbatch()
        # Training could not use the weights in FP8 that inference mode leaves behind.
        no_gradients = torch.no_grad() if chunks[0].config.fp8 else torch.inference_mode()
        with no_gradients, packed_projections(chunks):
            yield
    finally:
        for module, name in switched:
            setattr(module, name, True)
        for config in configs.values():
            config.sequence_parallel = sequence_parallel
        for chunk in chunks:
            chunk.train(was_training)
