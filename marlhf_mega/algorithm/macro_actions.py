"""Macro actions: runs of response tokens that form one decision (MA-RLHF, arXiv 2410.02743).

A segmentation is one `MacroActions` record, built from start flags. `pool` sums tokens into the
macro grid [batch, macro]; `spread` copies macro quantities back to their tokens. Both work on the
padded token layout [batch, response] and on the packed one [tokens], through the same flat index.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from marlhf_mega.algorithm.choices import Compat, ValueRule, check_choice

NO_ACTION = -1
"""The id of tokens that belong to no macro action: padding, and samples without a score."""


@dataclass(frozen=True, kw_only=True)
class MacroActions:
    """Which macro action every response token belongs to."""

    ids: Tensor
    """[batch, response] or packed [tokens] int64: 0..n-1 in each response, -1 on padding."""
    num_macro_actions: Tensor
    """[batch] int64; includes empty actions (ids without tokens), which only compat creates."""
    lengths: Tensor
    """[batch, macro] int64: tokens per action, 0 past the response's last action."""
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
            starts: [batch, response] bool, True on the first token of every macro action, and so
                on the first token of every response.
            response_mask: [batch, response] bool, True on real tokens, right padded.
            compat: "ma_rlhf" reproduces the released MA-RLHF code: the last token is always an
                action of its own, preceded by an empty action if the rule starts one there
                too.

        Raises:
            ValueError: the first token of a response starts no action.
        """
        check_choice("compat", compat, Compat)
        if without := (response_mask[:, :1] & ~starts[:, :1]).flatten().nonzero()[:, 0].tolist():
            raise ValueError(
                "starts: must be True on the first token of every response; it is not in rows "
                f"{without[:5]}. Use a rule of termination, or set starts[:, 0]."
            )
        ids = torch.where(response_mask, (starts & response_mask).cumsum(1) - 1, NO_ACTION)
        if compat == "ma_rlhf":
            lengths = response_mask.sum(1, keepdim=True)
            positions = torch.arange(response_mask.size(1), device=response_mask.device)
            ids = ids + (positions == lengths - 1)
        return MacroActions.from_ids(ids)

    @staticmethod
    def from_ids(ids: Tensor) -> "MacroActions":
        """Build the record from ids [batch, response], -1 on padding; synchronises the device."""
        batch = ids.size(0)
        num_macro_actions = ids.amax(1) + 1
        macro = int(num_macro_actions.max()) if batch else 0
        row_offsets = torch.arange(batch, device=ids.device).unsqueeze(1) * macro
        real = ids != NO_ACTION
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
        """Return the record for packed tensors `x[response_mask]`, with the same macro grid."""
        real = self.response_mask
        return MacroActions(
            ids=self.ids[real],
            num_macro_actions=self.num_macro_actions,
            lengths=self.lengths,
            slots=self.slots[real],
            response_mask=real[real],
        )

    def per_token(self) -> "MacroActions":
        """Return the record of the same tokens with every token an action of its own."""
        firsts = self.lengths.cumsum(1) - self.lengths
        real = self.response_mask
        lengths = self.lengths.sum(1)
        width = int(lengths.max()) if len(lengths) else 0
        rows = self.slots // max(self.lengths.size(1), 1)
        ids = torch.where(real, self.spread(firsts) + self.offsets(), NO_ACTION)
        return MacroActions(
            ids=ids,
            num_macro_actions=lengths,
            lengths=(torch.arange(width, device=ids.device) < lengths[:, None]).long(),
            slots=torch.where(real, ids + rows * width, len(lengths) * width),
            response_mask=real,
        )

    def pool(self, tokens: Tensor) -> Tensor:
        """Sum a token quantity over every macro action, ignoring padding: -> [batch, macro].

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
    """Weights that average token values into the value of an action; they sum to 1 in each action.

    With L tokens in the action and offset i in it: equal 1/L; unit 1 on the last token; position
    (1/(L-i))/H_L, the last token heaviest (the paper); position_repo (1/(i+1))/H_L, the first token
    heaviest (the released code); first 1 on the first token, the state value of the SMDP.

    Returns:
        Shape of actions.ids, zero on padding.
    """
    check_choice("rule", rule, ValueRule)
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
