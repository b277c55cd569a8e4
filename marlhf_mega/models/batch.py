"""What a model is run on: right-padded sequences of a prompt and a response each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """One microbatch. Column t of a `[batch, response]` tensor belongs to response token t."""

    tokens: Tensor
    """[batch, seq] int64: prompt, response, padding."""
    prompt_lengths: Tensor
    """[batch] int64, at least 1."""
    response_lengths: Tensor
    """[batch] int64, the end token included; 0 for a row that only fills up a batch."""
    rows: Tensor
    """[real] int64: the row of every real response token, row after row."""
    columns: Tensor
    """[real] int64: its column."""
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
    ) -> "SequenceBatch":
        """Pad sequences to the longest, rounded up so that ranks can share them evenly.

        Args:
            prompts: token ids, one list per row.
            responses: token ids, one list per row.
            pad_id: fills up; any id of the vocabulary, since nothing reads it.
            multiple: the padded length is a multiple of this.
            device: where the tensors go.
        """
        rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        longest = max(map(len, rows))
        width = -(-longest // multiple) * multiple
        tokens = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
        lengths = torch.tensor([len(r) for r in responses])
        num_columns = max(1, int(lengths.max()))
        real = torch.arange(num_columns) < lengths[:, None]
        row_index, column_index = real.nonzero(as_tuple=True)
        return SequenceBatch(
            tokens=tokens.to(device),
            prompt_lengths=torch.tensor([len(p) for p in prompts], device=device),
            response_lengths=lengths.to(device),
            rows=row_index.to(device),
            columns=column_index.to(device),
            num_columns=num_columns,
        )

    @property
    def response_mask(self) -> Tensor:
        """Bool [batch, response], True on real tokens."""
        grid = torch.arange(self.num_columns, device=self.tokens.device)
        return grid < self.response_lengths[:, None]

    @property
    def positions(self) -> Tensor:
        """[real] int64: where in the sequence every real response token stands."""
        return self.prompt_lengths[self.rows] + self.columns

    @property
    def response_tokens(self) -> Tensor:
        """[real] int64: the ids of the real response tokens."""
        return self.tokens[self.rows, self.positions]

    def to_grid(self, values: Tensor) -> Tensor:
        """Lay [real] values out as [batch, response], zero on padding; differentiable."""
        grid = values.new_zeros(len(self.tokens), self.num_columns)
        return grid.index_put((self.rows, self.columns), values)
