"""What a model is run on: sequences of a prompt and a response each, padded or packed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from marlhf_mega.config.limits import round_up


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """One microbatch. Column t of a `[batch, response]` tensor belongs to response token t."""

    tokens: Tensor
    """[batch, seq] int64: prompt, response, padding; packed [1, seq]: sequence after sequence, then
    padding."""
    lengths: tuple[int, ...] | None
    """Packed: tokens of each sequence, its own padding included. None: each has its row."""
    prompt_lengths: Tensor
    """[batch] int64; 0 where a prompt takes the place of the response."""
    response_lengths: Tensor
    """[batch] int64, the end token included; 0 for a filler."""
    grid_rows: Tensor
    """[real] int64: the sequence of every real response token, one after the other."""
    grid_columns: Tensor
    """[real] int64: its column."""
    token_rows: Tensor
    """[real] int64: its row in `tokens`."""
    token_columns: Tensor
    """[real] int64: where in that row it stands."""
    kept: Tensor | None
    """[real, width] on the CPU: which tokens the sampler's filters kept where each real response
    token was drawn, rows of `read_mask`; None where nothing was filtered."""
    routing: Tensor | None
    """[rows, columns, layers, top_k], like `tokens`: the experts that tokens went to in the
    rollout, see `models.routing`; None where they were not recorded."""
    num_columns: int
    """Width of `[batch, response]` tensors: the longest response, at least 1."""

    @staticmethod
    def create(
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        multiple: int,
        device: torch.device,
        packed: bool = False,
        context_multiple: int = 1,
        least_width: int = 1,
        kept: Tensor | None = None,
        routing: Tensor | None = None,
    ) -> "SequenceBatch":
        """Pad sequences to the longest, or put them all in one row.

        Lengths are rounded up so that ranks can share them evenly. Padding is id 0, never read.

        Args:
            prompts: token ids of each sequence.
            responses: token ids of each sequence.
            multiple: a row's length is a multiple of this.
            device: where the tensors go.
            packed: put the sequences one after the other in one row.
            context_multiple: packed: every sequence's length is a multiple of this.
            least_width: a row is no shorter.
            kept: [batch, response, width] on the CPU, see `SequenceBatch.kept`.
            routing: [batch, tokens of the longest, layers, top_k] on the CPU, of each sequence.
        """
        sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        if packed:
            sequences = [s + [0] * (-len(s) % context_multiple) for s in sequences]
        sizes = tuple(map(len, sequences))
        prompt_lengths = torch.tensor([len(p) for p in prompts])
        lengths = torch.tensor([len(r) for r in responses])
        num_columns = max(1, int(lengths.max()))
        rows, columns = (torch.arange(num_columns) < lengths[:, None]).nonzero(as_tuple=True)
        token_rows, starts = rows, prompt_lengths
        if packed:
            token_rows = torch.zeros_like(rows)
            starts = starts + torch.tensor([0, *accumulate(sizes[:-1])])
            sequences = [[token for sequence in sequences for token in sequence]]
        width = round_up(max(least_width, *map(len, sequences)), multiple)
        tokens = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
        if routing is not None:
            routing = _like_rows(routing, sizes, width=width, packed=packed).to(device)
        return SequenceBatch(
            tokens=tokens.to(device),
            lengths=sizes if packed else None,
            prompt_lengths=prompt_lengths.to(device),
            response_lengths=lengths.to(device),
            grid_rows=rows.to(device),
            grid_columns=columns.to(device),
            token_rows=token_rows.to(device),
            token_columns=(starts[rows] + columns).to(device),
            kept=None if kept is None else kept[rows, columns],
            routing=routing,
            num_columns=num_columns,
        )

    @property
    def response_mask(self) -> Tensor:
        """Bool [batch, response], True on real tokens."""
        grid = torch.arange(self.num_columns, device=self.tokens.device)
        return grid < self.response_lengths[:, None]

    @property
    def is_filler(self) -> Tensor:
        """Bool [batch], True on sequences without a response, which only make up a number."""
        return self.response_lengths == 0

    @property
    def response_tokens(self) -> Tensor:
        """[real] int64: the ids of the real response tokens."""
        return self.tokens[self.token_rows, self.token_columns]

    def at_last(self, grid: Tensor) -> Tensor:
        """Return [..., batch]: what [..., batch, response] holds at each last response token."""
        last = (self.response_lengths - 1).expand(grid.shape[:-1])
        return grid.gather(-1, last[..., None])[..., 0]

    def to_grid(self, values: Tensor, chosen: Tensor | slice = slice(None)) -> Tensor:
        """Lay values out as [batch, response, ...], zero elsewhere; differentiable.

        Args:
            values: [chosen, ...], one for each.
            chosen: which of the real response tokens; default: all.
        """
        size = (len(self.prompt_lengths), self.num_columns)
        grid = values.new_zeros(*size, *values.shape[1:])
        return grid.index_put((self.grid_rows[chosen], self.grid_columns[chosen]), values)


def _like_rows(values: Tensor, sizes: Sequence[int], *, width: int, packed: bool) -> Tensor:
    """Lay [batch, tokens, ...] out as the sequences' tokens lie: in a row each, or all in one."""
    parts = [row[:size] for row, size in zip(values, sizes, strict=True)]
    # What is recorded of a packed sequence ends before its own padding.
    parts = [pad_rows(part, size) for part, size in zip(parts, sizes, strict=True)]
    rows = [torch.cat(parts)] if packed else parts
    return torch.stack([pad_rows(row, width) for row in rows])


def pad_rows(values: Tensor, count: int) -> Tensor:
    """Fill [rows, ...] up with zeros to `count` rows."""
    return torch.cat((values, values.new_zeros(count - len(values), *values.shape[1:])))
