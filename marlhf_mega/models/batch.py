"""What a model is run on: sequences of a prompt and a response each, padded or packed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """One microbatch. Column t of a `[batch, response]` tensor belongs to response token t."""

    tokens: Tensor
    """[batch, seq] int64: prompt, response, padding; packed [1, seq]: sequence after sequence, then
    padding."""
    lengths: tuple[int, ...] | None
    """Packed: tokens of each sequence, its own padding included. None: each has its row."""
    prompt_lengths: Tensor
    """[batch] int64, at least 1."""
    response_lengths: Tensor
    """[batch] int64, the end token included; 0 for one that only fills up a batch."""
    rows: Tensor
    """[real] int64: the sequence of every real response token, one after the other."""
    columns: Tensor
    """[real] int64: its column."""
    lines: Tensor
    """[real] int64: its row in `tokens`."""
    positions: Tensor
    """[real] int64: where in that row it stands."""
    num_columns: int
    """Width of `[batch, response]` tensors: the longest response, at least 1."""

    @staticmethod
    def create(
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        pad_id: int,
        multiple: int,
        device: torch.device,
        packed: bool = False,
        context_multiple: int = 1,
    ) -> "SequenceBatch":
        """Pad sequences to the longest, or put them all in one row.

        Lengths are rounded up so that ranks can share them evenly.

        Args:
            prompts: token ids of each sequence.
            responses: token ids of each sequence.
            pad_id: fills up; any id of the vocabulary, since nothing reads it.
            multiple: a row's length is a multiple of this.
            device: where the tensors go.
            packed: put the sequences one after the other in one row.
            context_multiple: packed: every sequence's length is a multiple of this.
        """
        texts = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        if packed:
            texts = [text + [pad_id] * (-len(text) % context_multiple) for text in texts]
        sizes = tuple(map(len, texts))
        prompt_lengths = torch.tensor([len(p) for p in prompts])
        lengths = torch.tensor([len(r) for r in responses])
        num_columns = max(1, int(lengths.max()))
        rows, columns = (torch.arange(num_columns) < lengths[:, None]).nonzero(as_tuple=True)
        lines, starts = rows, prompt_lengths
        if packed:
            lines = torch.zeros_like(rows)
            starts = starts + torch.tensor([0, *accumulate(sizes[:-1])])
            texts = [[token for text in texts for token in text]]
        longest = max(map(len, texts))
        width = -(-longest // multiple) * multiple
        tokens = torch.tensor([text + [pad_id] * (width - len(text)) for text in texts])
        return SequenceBatch(
            tokens=tokens.to(device),
            lengths=sizes if packed else None,
            prompt_lengths=prompt_lengths.to(device),
            response_lengths=lengths.to(device),
            rows=rows.to(device),
            columns=columns.to(device),
            lines=lines.to(device),
            positions=(starts[rows] + columns).to(device),
            num_columns=num_columns,
        )

    @property
    def response_mask(self) -> Tensor:
        """Bool [batch, response], True on real tokens."""
        grid = torch.arange(self.num_columns, device=self.tokens.device)
        return grid < self.response_lengths[:, None]

    @property
    def response_tokens(self) -> Tensor:
        """[real] int64: the ids of the real response tokens."""
        return self.tokens[self.lines, self.positions]

    def to_grid(self, values: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Lay values out as [batch, response], zero elsewhere; differentiable.

        Args:
            values: [chosen], one for each.
            chosen: which of the real response tokens; default: all.
        """
        grid = values.new_zeros(len(self.prompt_lengths), self.num_columns)
        return grid.index_put((self.rows[chosen], self.columns[chosen]), values)
