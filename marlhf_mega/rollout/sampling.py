"""From vocabulary-sharded logits to one token a row, without gathering the vocabulary.

One uniform number decides a token by inverting the cumulative distribution, so a draw depends on
(seed, step, sample, position) only and costs a few numbers of communication a row. Ranks exchange
them three times: the largest logit, the sums of weights, and what each adds to the answer. They
could not do it once: where a number falls within a shard depends on the sums of all the others.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from marlhf_mega.algorithm.replay_mask import nucleus_mask, write_mask
from marlhf_mega.parallel.collectives import (
    gather_columns,
    gather_stacked,
    max_over_tensor,
    min_over_tensor,
    reduce_over_tensor,
)
from marlhf_mega.parallel.vocab import VocabShard
from marlhf_mega.rollout.nucleus import draw_from_nucleus


@dataclass(frozen=True, kw_only=True)
class SamplingRule:
    """How the next token is chosen."""

    temperature: float
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens that has this probability."""
    record_kept: bool = False
    """Write down which tokens the filters kept, for training on the samples."""
    min_kept: int | None = None
    """NLPO: `top_p` is that of a mask policy, which keeps at least so many tokens; None: of the
    model itself."""
    always_kept: tuple[int, ...] = ()
    """NLPO: tokens that the mask policy always keeps."""
    mixture: float = 0.0
    """Nash-MD: logits are (1 - mixture) times the model's plus mixture times the reference's."""

    @property
    def is_filtered(self) -> bool:
        """Whether tokens are drawn from some of the vocabulary only."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1.0)

    @property
    def has_mask(self) -> bool:
        """Whether a mask policy says which tokens are kept."""
        return self.min_kept is not None

    @property
    def has_second(self) -> bool:
        """Whether a second model reads the tokens too."""
        return self.has_mask or self.mixture > 0

    @property
    def records_kept(self) -> bool:
        """Whether there is something to write down, and it is wanted."""
        return self.record_kept and self.is_filtered


class SampledTokens(NamedTuple):
    """One token for every row, the same on all tensor-parallel ranks."""

    tokens: Tensor
    """[batch] int64."""
    logprobs: Tensor
    """[batch] float32, under the distribution that the tokens were drawn from."""
    full_logprobs: Tensor
    """[batch] float32, under softmax(logits / temperature) over the whole vocabulary."""
    kept: Tensor | None
    """[batch, width] rows of `read_mask`; None where nothing is recorded."""


def sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    *,
    rule: SamplingRule,
    shard: VocabShard,
    second: Tensor | None = None,
) -> SampledTokens:
    """Choose a token for every row. All tensor-parallel ranks call it and get the same answer.

    Args:
        logits: [batch, vocab/tp] float32, this rank's real columns.
        uniform: [batch] float64 in [0, 1).
        rule: temperature and filters.
        shard: which columns `logits` holds.
        second: [batch, vocab/tp] float32 of the mask policy or the reference, if the rule asks it.

    Returns:
        The tokens; greedy choices are scored at temperature 1.
    """
    if rule.mixture:
        assert second is not None
        logits = (1 - rule.mixture) * logits + rule.mixture * second
    if rule.temperature not in (0.0, 1.0):
        logits = logits / rule.temperature
    if rule.temperature > 0 and not rule.is_filtered:
        tokens, logprobs = _invert_cumulative(logits, uniform, shard)
        return SampledTokens(tokens, logprobs, logprobs, None)
    if rule.temperature == 0:
        return _most_likely(logits, shard)
    log_z = _log_sum_exp(logits, shard)
    if rule.has_mask:
        assert second is not None
        mask = _mask(second / rule.temperature, rule, shard)
        return _sample_filtered(logits, uniform, log_z, rule, shard, mask=mask)
    if rule.top_k == 0 and shard.group.size() > 1:
        return _sample_nucleus(logits, uniform, log_z, rule, shard)
    return _sample_filtered(logits, uniform, log_z, rule, shard)


def _mask(logits: Tensor, rule: SamplingRule, shard: VocabShard) -> Tensor:
    """Return bool [batch, vocab]: what a mask policy keeps."""
    tokens, values = _top(logits, shard.num_total, shard)
    return nucleus_mask(
        tokens,
        values.double().softmax(-1),
        top_p=rule.top_p,
        min_kept=rule.min_kept or 0,
        always_kept=rule.always_kept,
    )


def _most_likely(logits: Tensor, shard: VocabShard) -> SampledTokens:
    """Take the token with the highest logit, of equal ones the smallest id."""
    own, best = logits.max(-1)
    highest = own
    if shard.group.size() > 1:
        highest = max_over_tensor(own.clone(), shard.group)
    weight = (logits - highest[:, None]).exp_().sum(-1)
    if shard.group.size() > 1:
        best = (best + shard.start).masked_fill_(own != highest, shard.num_total - 1)
        min_over_tensor(best, shard.group)
        reduce_over_tensor(weight, shard.group)
    logprobs = weight.log_().neg_()
    return SampledTokens(best, logprobs, logprobs, None)


def _invert_cumulative(logits: Tensor, uniform: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Find the token at which the cumulative distribution, in id order, passes the number."""
    if shard.group.size() > 1:
        return _invert_shards(logits, uniform, shard)
    highest = logits.amax(-1, keepdim=True)
    # Sums in float64, so that the order of summation never decides a token.
    sums = (logits - highest).exp_().cumsum(-1, dtype=torch.float64)
    log_z = highest + sums[:, -1:].log()
    token = torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)
    token.clamp_(max=logits.shape[1] - 1)
    return token[:, 0], (logits.gather(1, token) - log_z)[:, 0].float()


def _invert_shards(logits: Tensor, uniform: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Do so with columns on several ranks, in few kernels."""
    group, rank, count = shard.group, shard.group.rank(), logits.shape[1]
    highest = max_over_tensor(logits.amax(-1), group)
    # Behind the weights there is a zero, for ranks whose columns all come before the token.
    weights = logits.new_empty(len(logits), count + 1)
    torch.sub(logits, highest[:, None], out=weights[:, :count]).exp_()
    weights[:, count].zero_()
    sums = weights[:, :count].cumsum(-1, dtype=torch.float64)
    bounds = gather_stacked(sums[:, -1], group).cumsum(0)
    target = uniform * bounds[-1]
    share = target - bounds[rank - 1] if rank else target
    # A rank before the token counts all of its columns and one behind it none, so that the sum is
    # the token's id. Only the token's own rank adds a weight; its bits pass as an integer.
    answer = torch.empty(2, len(logits), dtype=torch.int64, device=logits.device)
    column, weight = answer[0], answer[1].view(torch.float64)
    torch.searchsorted(sums, share[:, None], right=True, out=column[:, None])
    torch.mul(weights.gather(1, column[:, None])[:, 0], share >= 0, out=weight)
    reduce_over_tensor(answer, group)
    column.clamp_(max=shard.num_total - 1)
    return column, torch.log(weight.div_(bounds[-1]), out=torch.empty_like(highest))


def _sample_filtered(
    logits: Tensor,
    uniform: Tensor,
    log_z: Tensor,
    rule: SamplingRule,
    shard: VocabShard,
    *,
    mask: Tensor | None = None,
) -> SampledTokens:
    """Draw among the kept tokens, most likely first; [batch, vocab] `mask` replaces `top_p`."""
    limit = rule.top_k if rule.top_k > 0 else shard.num_total
    tokens, values = _top(logits, limit, shard)
    wide = values.double()
    probabilities = (wide - log_z[:, None]).exp_()
    if rule.top_k > 0:
        probabilities /= probabilities.sum(-1, keepdim=True)
    if mask is None:
        # A token stays while those before it have not reached top_p, so the first always stays.
        dropped = probabilities.cumsum(-1).sub_(probabilities) >= rule.top_p
    else:
        dropped = ~mask.gather(1, tokens)
    cumulative = probabilities.masked_fill_(dropped, 0.0).cumsum(-1)
    target = (uniform * cumulative[:, -1])[:, None]
    place = torch.searchsorted(cumulative, target, right=True).clamp_(max=tokens.shape[1] - 1)
    chosen = values.gather(1, place)[:, 0]
    kept_log_z = _log_sum_exp(wide.masked_fill_(dropped, -torch.inf))
    rows = None
    if rule.record_kept:
        rows = write_mask(tokens, ~dropped, top_k=rule.top_k, vocab_size=shard.num_total)
    return SampledTokens(
        tokens=tokens.gather(1, place)[:, 0],
        logprobs=(chosen - kept_log_z).float(),
        full_logprobs=chosen - log_z,
        kept=rows,
    )


def _sample_nucleus(
    logits: Tensor, uniform: Tensor, log_z: Tensor, rule: SamplingRule, shard: VocabShard
) -> SampledTokens:
    """Do what `_sample_filtered` does with top-p alone, without sorting the whole vocabulary."""
    found = draw_from_nucleus(logits, uniform, log_z, top_p=rule.top_p, shard=shard)
    rows = None
    if rule.record_kept:
        kept = found.keeps(logits, shard)
        ids = torch.arange(shard.num_total, device=kept.device).expand(len(kept), -1)
        rows = write_mask(ids, kept, top_k=0, vocab_size=shard.num_total)
    full = found.logit - log_z
    return SampledTokens(found.token, (full - found.mass.log()).float(), full.float(), rows)


def _top(logits: Tensor, count: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Return the ids and logits [batch, count] of the best tokens, ties by the smaller id."""
    count = min(count, shard.num_total)
    local = min(count, logits.shape[1])
    # Candidates go in id order into a stable sort, so that equal logits rank alike in every layout.
    ids = _best_ids(logits, local)
    values = logits.gather(1, ids)
    missing = count - local
    if missing:
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        ids = torch.nn.functional.pad(ids, (0, missing))
    every_value = gather_columns(values, shard.group)
    every_id = gather_columns(ids + shard.start, shard.group)
    ranked, order = every_value.sort(dim=-1, descending=True, stable=True)
    return every_id.gather(1, order)[:, :count], ranked[:, :count]


def _best_ids(logits: Tensor, count: int) -> Tensor:
    """Return the columns [batch, count] of the highest logits, ties by the smaller, in order."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    if count == len(columns):
        return columns.expand(len(logits), -1)
    values, ids = logits.topk(count, -1)
    edge = values[:, -1:]
    # Of equal logits at the edge, which are common in low precision, topk takes any.
    order = torch.where(logits == edge, -columns.float(), -torch.inf)
    order.scatter_(1, ids, torch.where(values > edge, 1.0, order.gather(1, ids)))
    return order.topk(count, -1).indices.sort(-1).values


def _log_sum_exp(values: Tensor, shard: VocabShard | None = None) -> Tensor:
    """Do what `logsumexp` does to finite numbers [batch, n] in few kernels; or to those of all."""
    highest = values.amax(-1)
    if shard is not None:
        max_over_tensor(highest, shard.group)
    total = (values - highest[:, None]).exp_().sum(-1)
    if shard is not None:
        reduce_over_tensor(total, shard.group)
    return total.log_().add_(highest)
