"""From vocabulary-sharded logits to one token a row, without gathering the vocabulary.

One uniform number decides a token by inverting the cumulative distribution, so a draw depends on
(seed, step, sample, position) only and costs a few numbers of communication a row.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from marlhf_mega.algorithm.replay_mask import nucleus_mask, write_mask
from marlhf_mega.parallel.collectives import gather_tensors, reduce_over_tensor
from marlhf_mega.parallel.vocab import VocabShard


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
    own = torch.logsumexp(logits, -1, keepdim=True)
    log_z = torch.logsumexp(_gather(own, shard), -1)
    if rule.temperature == 0:
        best, values = _top(logits, 1, shard)
        logprobs = values[:, 0] - log_z
        return SampledTokens(best[:, 0], logprobs, logprobs, None)
    if not rule.has_mask:
        return _sample_filtered(logits, uniform, log_z, rule, shard)
    assert second is not None
    mask = _mask(second / rule.temperature, rule, shard)
    return _sample_filtered(logits, uniform, log_z, rule, shard, mask=mask)


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


def _invert_cumulative(logits: Tensor, uniform: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Find the token at which the cumulative distribution, in id order, passes the number."""
    # A rank whose columns are all padding has nothing above -inf.
    highest = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
    # Sums in float64, so that the order of summation never decides a token.
    weights = (logits - highest).exp_().cumsum(-1, dtype=torch.float64)
    own = highest + weights[:, -1:].log()
    every = _gather(own, shard)
    log_z = torch.logsumexp(every, -1)
    bounds = (every - log_z[:, None]).exp_().cumsum(-1)
    target = uniform * bounds[:, -1]
    rank = shard.group.rank()
    owner = torch.searchsorted(bounds, target[:, None], right=True)[:, 0]
    owner = owner.clamp(max=bounds.shape[1] - 1)
    mass = (own[:, 0] - log_z).exp_()
    below = bounds[:, rank] - mass
    share = ((target - below) / mass).clamp(0, 1) * weights[:, -1]
    local = torch.searchsorted(weights, share[:, None], right=True)
    local = local.clamp(max=logits.shape[1] - 1)
    logprobs = logits.gather(1, local)[:, 0] - log_z
    # One sum carries both: ids are exact in float64, and only the owner adds anything.
    answer = torch.stack((local[:, 0] + shard.start, logprobs))
    answer = reduce_over_tensor(torch.where(owner == rank, answer, 0.0), shard.group)
    return answer[0].long(), answer[1].float()


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
    probabilities = (values.double() - log_z[:, None]).exp()
    if rule.top_k > 0:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    # A token stays while those before it have not reached top_p, so the first always stays.
    before = probabilities.cumsum(-1) - probabilities
    kept = before < rule.top_p if mask is None else mask.gather(1, tokens)
    cumulative = torch.where(kept, probabilities, 0.0).cumsum(-1)
    target = (uniform * cumulative[:, -1])[:, None]
    place = torch.searchsorted(cumulative, target, right=True).clamp(max=tokens.shape[1] - 1)
    chosen = values.gather(1, place)[:, 0]
    kept_log_z = torch.where(kept, values.double(), -torch.inf).logsumexp(-1)
    rows = None
    if rule.record_kept:
        rows = write_mask(tokens, kept, top_k=rule.top_k, vocab_size=shard.num_total)
    return SampledTokens(
        tokens=tokens.gather(1, place)[:, 0],
        logprobs=(chosen.double() - kept_log_z).float(),
        full_logprobs=chosen - log_z,
        kept=rows,
    )


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
    every_value = _gather(values, shard)
    every_id = _gather(ids + shard.start, shard)
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


def _gather(columns: Tensor, shard: VocabShard) -> Tensor:
    """Concatenate the tensor-parallel ranks' [batch, n] along the last dim, in rank order."""
    return torch.cat(gather_tensors(columns, shard.group), dim=-1)
