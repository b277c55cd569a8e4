"""Several sequences packed in one row, and attention that keeps them apart.

Megatron-Core sees a batch of one: everything but the core attention treats tokens independently,
and rotary angles are passed for every token. Only the core attention is told where sequences end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from marlhf_mega.config.limits import power_of_two
from marlhf_mega.parallel.context import ContextShare
from marlhf_mega.parallel.mesh import Group

LEAST_SEQUENCES, LEAST_LONGEST = 32, 2048
"""Smallest numbers that Transformer Engine is given. cuDNN plans for no fewer sequences; blocks of
a kernel that lie behind the end of a sequence return at once."""


@dataclass(frozen=True)
class Packing:
    """Where sequences lie in a row; Megatron-Core passes it through as `packed_seq_params`."""

    lengths: tuple[int, ...]
    """Tokens of each sequence, in order; their sum is the width of the row."""
    ends: Tensor
    """[sequences + 1] int32: where each sequence begins, then the end of the row."""
    share: ContextShare | None = None
    """This rank's tokens of the row with context parallelism, else None."""
    wanted: Tensor | None = None
    """[wanted] int64, indices into [seq * batch]: tokens that the head reads; None means all."""
    routing: Tensor | None = None
    """[layers of the chunk, seq * batch, top_k] of this rank's tokens: the experts that they go to,
    see `models.routing`; None: routers choose."""
    dropout_keys: Tensor | None = None
    """[seq * batch] int64 of this rank's tokens, see `models.adapter_dropout`; None: adapters drop
    nothing."""
    qkv_format: str = "sbhd"
    """What Megatron-Core looks at: for `thd` it would rotate queries and keys in a Python loop over
    the sequences, and synchronise with the device for each."""

    @staticmethod
    def of(
        lengths: Sequence[int],
        *,
        width: int,
        device: torch.device,
        context: Group | None = None,
    ) -> "Packing":
        """Describe a row of `width` tokens; padding at its end becomes a sequence of its own.

        Args:
            lengths: tokens of each sequence.
            width: of the row.
            device: of the model.
            context: the context-parallel group; None means that this rank has all tokens.
        """
        rest = width - sum(lengths)
        whole = (*lengths, rest) if rest else tuple(lengths)
        ends = torch.tensor([0, *accumulate(whole)], dtype=torch.int32)
        share = None if context is None else ContextShare(whole, context, device)
        return Packing(whole, ends.to(device), share)

    @property
    def positions(self) -> Tensor:
        """[width] int64: every token's position in its sequence."""
        sizes = self.ends.diff()
        starts = self.ends[:-1].repeat_interleave(sizes, output_size=sum(self.lengths))
        return torch.arange(len(starts), device=starts.device) - starts

    def for_engine(self) -> PackedSeqParams:
        """Return the same description for Transformer Engine, in one of few shapes.

        Empty sequences at the end make up the number, and the longest is rounded up: it is a bound.
        """
        longest = power_of_two(max(self.lengths), least=LEAST_LONGEST)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self._engine_ends,
            cu_seqlens_kv=self._engine_ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    @cached_property
    def _engine_ends(self) -> Tensor:
        missing = power_of_two(len(self.lengths), least=LEAST_SEQUENCES) - len(self.lengths)
        return torch.cat((self.ends, self.ends[-1:].expand(missing)))

    def per_sequence(self, attend: Callable[..., Tensor], *qkv: Tensor) -> Tensor:
        """Call `attend` on each sequence's part of [width, ...] tensors and join the results.

        On CPUs this is faster than one call on padded sequences, which attends to padding too.
        """
        if len(self.lengths) == 1:
            return attend(*qkv)
        parts = zip(*(tensor.split(self.lengths) for tensor in qkv), strict=True)
        return torch.cat([attend(*part) for part in parts])


def packing_engine(engine: Any) -> type:
    """Return a subclass of Transformer Engine's attention that accepts a `Packing`.

    Args:
        engine: Megatron-Core's wrapper of that attention.
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

            # By default the engine takes every row for one sequence.
            if packed_seq_params is None or len(packed_seq_params.lengths) == 1:
                return attend(query, key, value)
            if query.dtype == torch.float32:  # the engine's kernels for packed rows are 16-bit only
                return packed_seq_params.per_sequence(attend, query, key, value)
            qkv = (tensor.squeeze(1) for tensor in (query, key, value))
            output = attend(*qkv, packed_seq_params=packed_seq_params.for_engine())
            return output.reshape(len(output), 1, -1)

    return PackedAttention
