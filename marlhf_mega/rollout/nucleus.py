"""Top-p over a sharded vocabulary, of which each rank sorts only its own columns.

The tokens of all ranks have one order: the most likely first, of equal ones the smaller id. Every
rank offers some of its own, evenly spaced in that order, as pivots, and one sum over the ranks
tells how much probability lies up to each of them. Between two neighbouring pivots a rank has few
tokens: these are gathered to find the place where the cumulative probability passes a number.
"""

from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from marlhf_mega.parallel.collectives import gather_columns, reduce_over_tensor
from marlhf_mega.parallel.vocab import VocabShard


class Nucleus(NamedTuple):
    """The kept tokens, and one that was drawn of them; all tensor-parallel ranks have the same."""

    token: Tensor
    """[batch] int64."""
    logit: Tensor
    """[batch] float64, of that token."""
    mass: Tensor
    """[batch] float64: the kept tokens' probability."""
    last_token: Tensor
    """[batch] int64: of the kept ones the last in order."""
    last_logit: Tensor
    """[batch] float64."""

    def keeps(self, logits: Tensor, shard: VocabShard) -> Tensor:
        """Return bool [batch, vocab]: which tokens of the whole vocabulary are kept.

        Args:
            logits: [batch, vocab/tp], this rank's.
            shard: which columns these are.
        """
        ids = torch.arange(logits.shape[1], device=logits.device) + shard.start
        token, logit = self.last_token[:, None], self.last_logit[:, None]
        kept = (logits > logit) | ((logits == logit) & (ids <= token))
        columns = F.pad(kept.byte(), (0, shard.most_real - kept.shape[1]))
        return gather_columns(columns, shard.group)[:, : shard.num_total].bool()


def draw_from_nucleus(
    logits: Tensor, uniform: Tensor, log_z: Tensor, *, top_p: float, shard: VocabShard
) -> Nucleus:
    """Keep the smallest set of tokens that has probability top_p; draw one, most likely first.

    Args:
        logits: [batch, vocab/tp] float32, this rank's real columns.
        uniform: [batch] float64 in [0, 1).
        log_z: [batch], of all ranks' logits.
        top_p: below 1.
        shard: which columns `logits` holds.
    """
    order = _Order(logits, log_z, shard)
    below, (values, ids, probabilities) = order.passing(torch.full_like(uniform, top_p))
    # A token stays while those before it have not reached top_p, so the first always stays.
    before = below + probabilities.cumsum(-1).sub_(probabilities)
    dropped = before >= top_p
    mass = below[:, 0] + probabilities.masked_fill(dropped, 0.0).sum(-1)
    last = (dropped.shape[1] - 1 - dropped.sum(-1, keepdim=True)).clamp_(min=0)
    target = uniform * mass
    below, window = order.passing(target)
    cumulative = window[2].cumsum(-1).add_(below)
    place = torch.searchsorted(cumulative, target[:, None], right=True)
    place.clamp_(max=cumulative.shape[1] - 1)
    return Nucleus(
        token=window[1].gather(1, place)[:, 0].long(),
        logit=window[0].gather(1, place)[:, 0],
        mass=mass,
        last_token=ids.gather(1, last)[:, 0].long(),
        last_logit=values.gather(1, last)[:, 0],
    )


class _Order:
    """All ranks' tokens in order, and the probability up to each pivot."""

    def __init__(self, logits: Tensor, log_z: Tensor, shard: VocabShard) -> None:
        self.group = shard.group
        size = shard.most_real
        self.step = isqrt(size - 1) + 1
        # Behind the last token there is room for a window.
        room = size + self.step + 1 - logits.shape[1]
        self.values, order = F.pad(logits, (0, room), value=-torch.inf).sort(
            dim=-1, descending=True, stable=True
        )
        self.ids = order + shard.start
        self.probabilities = (self.values.double() - log_z[:, None]).exp_()
        own = torch.arange(self.step, size + 1, self.step, device=logits.device)
        pivots = gather_columns(self.values[:, own - 1], self.group)
        # Of equal tokens those of lower ranks come first.
        lower, rank = self.group.rank() * len(own), -self.values
        after = torch.searchsorted(rank, -pivots[:, :lower], right=False)
        up_to = torch.searchsorted(rank, -pivots[:, lower + len(own) :], right=True)
        counts = torch.cat((after, own.expand(len(logits), -1), up_to), dim=-1)
        self.counts = F.pad(counts, (1, 0))
        """[batch, 1 + pivots]: this rank's tokens up to each pivot, from none on."""
        masses = F.pad(self.probabilities.cumsum(-1), (1, 0)).gather(1, self.counts)
        self.masses = reduce_over_tensor(masses, self.group)
        """[batch, 1 + pivots]: all ranks' probability up to each pivot."""

    def passing(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens among which the cumulative probability passes [batch] numbers.

        Returns:
            [batch, 1]: the probability of all before them; float64 [3, batch, window]: logits, ids
            and probabilities, in order. After the place come some tokens, not all.
        """
        pivot = self.masses.masked_fill(self.masses > mass[:, None], -1.0).argmax(-1, keepdim=True)
        # One token more, in case that sums in another order do not quite reach the next pivot.
        offsets = torch.arange(self.step + 1, device=mass.device)
        columns = self.counts.gather(1, pivot) + offsets
        parts = (self.values, self.ids, self.probabilities)
        window = torch.stack([part.gather(1, columns).double() for part in parts])
        window = gather_columns(window, self.group)
        order = window[0].argsort(dim=-1, descending=True, stable=True)
        return self.masses.gather(1, pivot), window.gather(2, order.expand_as(window))
