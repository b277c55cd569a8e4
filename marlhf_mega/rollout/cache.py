"""Keys and values of the sequences in flight, and the attention that reads them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from marlhf_mega.config.limits import round_up
from marlhf_mega.models.layers import SdpaAttention, causal_mask
from marlhf_mega.rollout.work import Decode, Prefill, Work

LENGTH_STEP = 16
"""A decode step reads a multiple of it: a CPU compiles its products anew for every length."""


class KeyValueCache:
    """The rotated keys and the values of one model chunk's layers, a slot for each sequence."""

    def __init__(
        self,
        attentions: Sequence[SdpaAttention],
        *,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate it.

        Args:
            attentions: of the layers.
            shape: slots, groups, tokens, head_dim.
            dtype: of keys and values.
            device: where they are.
        """
        self.attentions = attentions
        self.on_cpu = device.type == "cpu"
        self.by_products = self.on_cpu or attentions[0].softcap is not None
        """Whether tokens attend by `_products`."""
        self.num_slots, groups, self.max_tokens, head_dim = shape
        # A CPU multiplies a query by keys twice as fast if they lie like the right factor.
        key_dims = (head_dim, self.max_tokens) if self.on_cpu else (self.max_tokens, head_dim)
        layers = len(attentions)
        self.keys = torch.zeros(
            layers, self.num_slots, groups, *key_dims, dtype=dtype, device=device
        )
        self.values = torch.zeros(layers, *shape, dtype=dtype, device=device)
        self.slots = torch.arange(self.num_slots, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def clear(self) -> None:
        """Forget all: what a diverged model left, unlike a number, would not be weighted by 0."""
        self.keys.zero_()
        self.values.zero_()

    def move_slot(self, source: int, target: int) -> None:
        """Copy a sequence's keys and values to another slot."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def masks(self, work: Work) -> list[Tensor | None]:
        """Say what each layer's queries may see, as `attend` wants it; equal windows share one."""
        windows = [attention.window for attention in self.attentions]
        distinct: dict[int | None, Tensor | None] = {}
        for window in set(windows):
            if isinstance(work, Prefill):
                distinct[window] = self._prompt_mask(work, window)
            else:
                distinct[window] = self._token_mask(work, window)
        return [distinct[window] for window in windows]

    def attend(
        self,
        index: int,
        query_key_value: tuple[Tensor, Tensor, Tensor],
        work: Work,
        mask: Tensor | None,
    ) -> Tensor:
        """Store a layer's new keys and values and attend to all of each sequence.

        Args:
            index: of the layer in this chunk.
            query_key_value: [seq, batch, groups, heads per group, head_dim], and twice [seq,
                batch, groups, head_dim].
            work: where they belong.
            mask: the layer's of `masks(work)`.

        Returns:
            [seq, batch, heads * head_dim].
        """
        if isinstance(work, Prefill):
            return self._attend_prompts(index, query_key_value, work, mask)
        assert mask is not None
        query, key, value = (x[0] for x in query_key_value)
        batch = len(query)
        keys, values = self.keys[index], self.values[index]
        slots, longest = self.slots[:batch], self._padded(work.longest)
        values[slots, :, work.positions] = value
        if self.on_cpu:
            keys[slots, :, :, work.positions] = key
        else:
            keys[slots, :, work.positions] = key
            keys = keys.transpose(2, 3)
        keys, values = keys[:batch, ..., :longest], values[:batch, :, :longest]
        if self.by_products:
            context = _products(
                self.attentions[index],
                query.flatten(0, 1),
                keys.flatten(0, 1),
                values.flatten(0, 1),
                mask,
            )
        else:
            # Heads that share keys go as queries of one head: each key is read once.
            context = self.attentions[index].attend(query, keys.mT, values, mask=mask)
        return context.reshape(1, batch, -1)

    def _attend_prompts(
        self,
        index: int,
        query_key_value: tuple[Tensor, Tensor, Tensor],
        work: Prefill,
        mask: Tensor | None,
    ) -> Tensor:
        query, key, value = query_key_value
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query.flatten(2, 3), key, value))
        new, seq = slice(work.first_slot, work.first_slot + len(work.rows)), k.shape[2]
        keys = self.keys[index].transpose(2, 3) if self.on_cpu else self.keys[index]
        keys[new, :, :seq] = k[work.rows]
        self.values[index, new, :, :seq] = v[work.rows]
        context = self.attentions[index].attend(q, k, v, mask=mask)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _padded(self, longest: int) -> int:
        return min(round_up(longest, LENGTH_STEP), self.max_tokens)

    def _prompt_mask(self, work: Prefill, window: int | None) -> Tensor | None:
        """Return bool [seq, seq]; none where plain causal attention will do."""
        size = work.tokens.shape[1]
        if window is None or window >= size:
            return None
        return causal_mask(size, window=window, device=work.tokens.device)

    def _token_mask(self, work: Decode, window: int | None) -> Tensor:
        """Return what to add to scores, [sets of keys, 1, keys] or, for `attend`, [batch, 1, ..].

        Zero where a key is seen. Made once a step: `attend` would make it of flags in every layer.
        """
        longest = self._padded(work.longest)
        # The kernels of GPUs want rows that start at 16 bytes, or copy the mask.
        columns = torch.arange(round_up(longest, LENGTH_STEP), device=work.positions.device)
        distance = work.positions[:, None] - columns
        unseen = distance < 0
        if window is not None:
            unseen |= distance >= window
        hidden = torch.zeros_like(unseen, dtype=self.values.dtype).masked_fill_(unseen, -torch.inf)
        hidden = hidden[:, :longest]
        if self.by_products:
            return hidden.repeat_interleave(self.values.shape[2], 0)[:, None, :]
        return hidden[:, None, None, :]


def _products(
    attention: SdpaAttention, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor
) -> Tensor:
    """Attend by plain products, which for a few queries beat the fused kernel of a CPU.

    Args:
        attention: its scale and softcap.
        query: [sets of keys, queries, head_dim].
        keys: [sets of keys, head_dim, keys].
        values: [sets of keys, keys, head_dim].
        mask: [sets of keys, 1, keys], added to the scores.

    Returns:
        [sets of keys, queries, head_dim].
    """
    if attention.softcap is None:
        mask = mask.expand(-1, query.shape[1], -1)
        scores = torch.baddbmm(mask, query, keys, alpha=attention.scale)
    else:
        scores = torch.bmm(query, keys).mul_(attention.scale / attention.softcap)
        scores = scores.tanh_().mul_(attention.softcap).add_(mask)
    return torch.bmm(scores.softmax(-1), values)
