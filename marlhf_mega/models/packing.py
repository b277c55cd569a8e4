"""Sequences one after the other in one row, and attention that keeps them apart.

Megatron-Core sees a batch of one: everything but the core attention works on single tokens, and
rotary angles are given for every token. Only the core attention is told where sequences end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from marlhf_mega.parallel.context import ContextShare
from marlhf_mega.parallel.mesh import Group


@dataclass(frozen=True)
class Packing:
    """Where sequences lie in a row; Megatron-Core hands it through as its `packed_seq_params`."""

    lengths: tuple[int, ...]
    """Tokens of each, in order; they fill the row."""
    ends: Tensor
    """[sequences + 1] int32: where each begins, and the end of the row."""
    share: ContextShare | None = None
    """This rank's part of the row, where ranks share it."""
    wanted: Tensor | None = None
    """[chosen] int64, of [seq * batch]: the tokens that the head reads; none: all."""
    qkv_format: str = "sbhd"
    """What Megatron-Core asks for: for `thd` it would walk over the sequences in Python to rotate
    queries and keys, and wait for the device at each."""

    @staticmethod
    def of(
        lengths: Sequence[int],
        *,
        width: int,
        device: torch.device,
        context: Group | None = None,
    ) -> "Packing":
        """Describe a row of `width` tokens; what is left at its end is a sequence of its own.

        Args:
            lengths: tokens of each sequence.
            width: of the row.
            device: of the model.
            context: ranks that share every sequence; none: this rank has them whole.
        """
        rest = width - sum(lengths)
        whole = (*lengths, rest) if rest else tuple(lengths)
        ends = torch.tensor([0, *accumulate(whole)], dtype=torch.int32)
        share = None if context is None else ContextShare(whole, context, device)
        return Packing(whole, ends.to(device), share)

    @property
    def positions(self) -> Tensor:
        """[width] int64: every token's place in its sequence."""
        sizes = self.ends.diff()
        starts = self.ends[:-1].repeat_interleave(sizes, output_size=sum(self.lengths))
        return torch.arange(len(starts), device=starts.device) - starts

    def for_engine(self) -> PackedSeqParams:
        """Say the same to Transformer Engine."""
        longest = max(self.lengths)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.ends,
            cu_seqlens_kv=self.ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    def apart(self, attend: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """Call `attend` on each sequence's part of [width, ...] tensors; join the results.

        On CPUs this takes less time than one call on padded sequences, which attends to padding.
        """
        if len(self.lengths) == 1:
            return attend(*rows)
        parts = zip(*(row.split(self.lengths) for row in rows), strict=True)
        return torch.cat([attend(*part) for part in parts])


def packing_engine(engine: Any) -> type:
    """Return Transformer Engine's attention made to take a `Packing`.

    Args:
        engine: Megatron-Core's module around it.
    """

    class PackedAttention(engine):
        def forward(
            self,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None,
            packed_seq_params: Packing | None = None,
            **others: Any,
        ) -> Tensor:
            def attend(*qkv: Tensor, **packed: PackedSeqParams) -> Tensor:
                output: Tensor = engine.forward(self, *qkv, attention_mask, **others, **packed)
                return output

            # One sequence in every row is what the engine takes for granted.
            if packed_seq_params is None or len(packed_seq_params.lengths) == 1:
                return attend(query, key, value)
            if query.dtype == torch.float32:  # the engine's kernels for packed rows take 16 bits
                return packed_seq_params.apart(attend, query, key, value)
            rows = (row.squeeze(1) for row in (query, key, value))
            output = attend(*rows, packed_seq_params=packed_seq_params.for_engine())
            return output.reshape(len(output), 1, -1)

    return PackedAttention
