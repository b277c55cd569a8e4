"""Macro actions: blocks of response tokens that act as one decision (MA-RLHF, arXiv 2410.02743).

A segmentation is one `MacroActions` record built from start flags. `pool` sums tokens into the
macro grid [batch, macro], `spread` copies a macro quantity back to its tokens. Both work on the
padded token layout [batch, response] and on the packed one [tokens] through the same flat index.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Compat = Literal["none", "ma_rlhf"]
ValueRule = Literal["equal", "unit", "position", "position_repo", "first"]


@dataclass(frozen=True, kw_only=True)
class MacroActions:
    """Which macro action every response token belongs to."""

    ids: Tensor
    """[batch, response] or packed [tokens] int64: 0..n-1 per row, -1 on padding."""
    num_macro_actions: Tensor
    """[batch] int64; counts empty actions (an id that no token has), which only compat makes."""
    lengths: Tensor
    """[batch, macro] int64: real tokens per action, 0 beyond the row's last action."""
    slots: Tensor
    """Shape of ids, int64: flat index into [batch, macro]; batch * macro on padding."""
    response_mask: Tensor
    """Shape of ids, bool: True on real tokens."""

    @staticmethod
    def from_starts(
        starts: Tensor, response_mask: Tensor, *, compat: Compat = "none"
    ) -> "MacroActions":
        """Build the record from the start flags of a termination rule.

        Args:
            starts: [batch, response] bool, True on the first token of every macro action, so on
                the first token of every row.
            response_mask: [batch, response] bool, True on real tokens, right padded.
            compat: "ma_rlhf" reproduces the released MA-RLHF code: the last token is always an
                action of its own, and if the rule starts an action there too, an empty action
                is inserted before it.
        """
        ids = torch.where(response_mask, (starts & response_mask).cumsum(1) - 1, -1)
        if compat == "ma_rlhf":
            lengths = response_mask.sum(1, keepdim=True)
            positions = torch.arange(response_mask.size(1), device=response_mask.device)
            ids = ids + (positions == lengths - 1)
        return MacroActions.from_ids(ids)

    @staticmethod
    def from_ids(ids: Tensor) -> "MacroActions":
        """Build the record from ids [batch, response], -1 on padding; reads one number back."""
        batch = ids.size(0)
        num_macro_actions = ids.amax(1) + 1
        macro = int(num_macro_actions.max()) if batch else 0
        row_offsets = torch.arange(batch, device=ids.device).unsqueeze(1) * macro
        real = ids >= 0
        slots = torch.where(real, ids + row_offsets, batch * macro)
        counts = slots.new_zeros(batch * macro + 1)
        counts.scatter_add_(0, slots.flatten(), torch.ones_like(slots).flatten())
        return MacroActions(
            ids=ids,
            num_macro_actions=num_macro_actions,
            lengths=counts[:-1].view(batch, macro),
            slots=slots,
            response_mask=real,
        )

    def pack(self) -> "MacroActions":
        """Drop padding: the record for packed token tensors `x[response_mask]`; same macro grid."""
        real = self.response_mask
        return MacroActions(
            ids=self.ids[real],
            num_macro_actions=self.num_macro_actions,
            lengths=self.lengths,
            slots=self.slots[real],
            response_mask=real[real],
        )

    @property
    def macro_mask(self) -> Tensor:
        """[batch, macro] bool, True on the actions of the row, empty ones included."""
        grid = torch.arange(self.lengths.size(1), device=self.lengths.device)
        return grid < self.num_macro_actions.unsqueeze(1)

    def pool(self, tokens: Tensor) -> Tensor:
        """Sum a token quantity inside every macro action, padding ignored: -> [batch, macro].

        The backward pass is a gather.
        """
        grid = tokens.new_zeros(self.lengths.numel() + 1)
        pooled = grid.scatter_add(0, self.slots.flatten(), tokens.flatten())
        return pooled[:-1].view_as(self.lengths)

    def spread(self, macro: Tensor) -> Tensor:
        """Copy [batch, macro] to the tokens of every macro action, 0 on padding.

        The backward pass is a scatter add.
        """
        grid = torch.cat((macro.flatten(), macro.new_zeros(1)))
        return grid.index_select(0, self.slots.flatten()).view_as(self.slots)

    def offsets(self) -> Tensor:
        """Position of every real token inside its macro action, from 0; shape of ids, int64."""
        rank = self.response_mask.flatten().cumsum(0).view_as(self.ids) - 1
        firsts = self.lengths.flatten().cumsum(0).view_as(self.lengths) - self.lengths
        return rank - self.spread(firsts)


def value_weights(actions: MacroActions, rule: ValueRule, *, dtype: torch.dtype) -> Tensor:
    """Weights that average token values into a macro value; they sum to 1 inside an action.

    With L tokens in the action and i the offset inside it: equal 1/L; unit 1 on the last token;
    position (1/(L-i))/H_L, the last token heaviest (the paper); position_repo (1/(i+1))/H_L, the
    first heaviest (the released code); first 1 on the first token, the SMDP state value.

    Returns:
        Shape of actions.ids, zero on padding.
    """
    if rule == "equal":
        return actions.spread(actions.lengths.to(dtype).clamp(min=1).reciprocal())
    offsets, lengths = actions.offsets(), actions.spread(actions.lengths)
    if rule == "first":
        return ((offsets == 0) & actions.response_mask).to(dtype)
    if rule == "unit":
        return ((offsets == lengths - 1) & actions.response_mask).to(dtype)
    rank = offsets + 1 if rule == "position_repo" else lengths - offsets
    weights = torch.where(actions.response_mask, rank.to(dtype).reciprocal(), 0.0)
    return weights / actions.spread(actions.pool(weights)).clamp(min=1)
