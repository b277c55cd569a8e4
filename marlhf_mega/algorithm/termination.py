"""Termination rules: where macro actions start (MA-RLHF, arXiv 2410.02743, section on termination).

Every rule returns start flags [batch, response] bool, with a start on the first token of each
response and none on padding. `response_mask` [batch, response] is right-padded: True, then False.
Flags are computed once per rollout, after generation.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from marlhf_mega.algorithm.choices import Compat, EosRule, PerplexityForm, RandomMode, check_choice
from marlhf_mega.algorithm.counter_rng import fold


def fixed_ngram(response_mask: Tensor, *, n: int) -> Tensor:
    """Start an action every `n` tokens; n=1 is token PPO, a large n makes one action."""
    if n < 1:
        raise ValueError(f"macro.n={n}: must be at least 1. Use 1 for token-level PPO.")
    return response_mask & (_positions(response_mask) % n == 0)


def whole_response(response_mask: Tensor) -> Tensor:
    """One action per response, EOS included."""
    return response_mask & (_positions(response_mask) == 0)


def given(response_mask: Tensor, starts: Tensor) -> Tensor:
    """Take flags from a parser or an environment; the first token always starts an action."""
    return (starts & response_mask) | whole_response(response_mask)


def sentence(
    response_mask: Tensor, ends_sentence: Tensor, *, ends_with_eos: Tensor | None = None
) -> Tensor:
    """Start an action after every token that ends a sentence.

    Args:
        response_mask: [batch, response] bool.
        ends_sentence: [batch, response] bool, True where the token ends a sentence or a line.
        ends_with_eos: [batch] bool, responses whose last token is EOS. It has no text, so it stays
            in the last sentence.
    """
    starts = given(response_mask, ends_sentence.roll(1, 1))
    if ends_with_eos is None:
        return starts
    eos = _is_last(response_mask) & ends_with_eos.unsqueeze(1)
    return starts & (~eos | whole_response(response_mask))


def ngrams_of_lengths(response_mask: Tensor, lengths: Tensor) -> Tensor:
    """Actions of given lengths; the tokens after the last of them form one more action.

    Args:
        response_mask: [batch, response] bool.
        lengths: [batch, num] int64, at least 1 each.
    """
    response = response_mask.size(1)
    ends = lengths.cumsum(1).clamp(max=response)
    starts = response_mask.new_zeros(response_mask.size(0), response + 1)
    return given(response_mask, starts.scatter(1, ends, value=True)[:, :response])


def random_ngram(
    response_mask: Tensor,
    *,
    lengths: Sequence[int],
    repeats: int,
    mode: RandomMode,
    keys: Tensor,
) -> Tensor:
    """Actions with lengths from a shuffled list, which contains each length `repeats` times.

    Args:
        response_mask: [batch, response] bool.
        lengths: action lengths; the paper uses 2, 3, 5, 10.
        repeats: copies of each length in the list; the paper uses 3.
        mode: "list" uses one shuffled list, and the tokens after it form one action; "cycle"
            shuffles again until the response ends.
        keys: [batch] int64, one per sample: `fold(seed, step, global sample index)`.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"macro.lengths={list(lengths)}: must list lengths of at least 1 token.")
    if repeats < 1:
        raise ValueError(f"macro.repeats={repeats}: must be at least 1.")
    check_choice("mode", mode, RandomMode)
    pool = torch.tensor(list(lengths) * repeats, device=response_mask.device)
    num_lists = -(-response_mask.size(1) // int(pool.sum())) if mode == "cycle" else 1
    draws = torch.arange(num_lists * pool.numel(), device=keys.device)
    noise = fold(keys.unsqueeze(1), draws).view(-1, num_lists, pool.numel())
    return ngrams_of_lengths(response_mask, pool[noise.argsort(2)].flatten(1))


def perplexity(
    response_mask: Tensor,
    ref_logprobs: Tensor,
    *,
    form: PerplexityForm,
    compat: Compat = "none",
) -> Tensor:
    """Start an action where the reference model's perplexity rises.

    With u = -ref_logprobs, an action starts at t if
    token: u[t] > u[t-1], the token is less likely than the one before;
    prefix: u[t] > mean(u[0..t-1]), the perplexity of the whole prefix rises;
    segment: u[t] > mean(u) of the current action, whose perplexity would rise.

    Args:
        response_mask: [batch, response] bool.
        ref_logprobs: [batch, response] float; anything on padding.
        form: see above.
        compat: "ma_rlhf" sets the flag of form "token" one token early, as the released code does.
    """
    check_choice("form", form, PerplexityForm)
    surprise = torch.where(response_mask, -ref_logprobs, 0.0)
    if form == "segment":
        return given(response_mask, _segment_perplexity_rises(surprise))
    level = surprise
    if form == "prefix":
        level = surprise.cumsum(1) / (_positions(surprise) + 1)
    starts = torch.zeros_like(response_mask)
    starts[:, 1:] = (surprise[:, 1:] > level[:, :-1]) & response_mask[:, 1:]
    if form == "token" and compat == "ma_rlhf":
        starts = starts.roll(-1, 1)
    return given(response_mask, starts)


def _segment_perplexity_rises(surprise: Tensor) -> Tensor:
    """Compare with the mean of the current action; sequential in tokens, batched in responses."""
    total = torch.zeros_like(surprise[:, 0])
    count = torch.zeros_like(total)
    starts = []
    for current in surprise.unbind(1):
        start = current * count > total
        count = torch.where(start, 1.0, count + 1.0)
        total = torch.where(start, current, total + current)
        starts.append(start)
    return torch.stack(starts, 1)


def probability(
    response_mask: Tensor, old_logprobs: Tensor, *, below: float, every: int = 1
) -> Tensor:
    """Start an action at every n-th token that the policy found unlikely, from the first one on.

    Unlikely: exp(old_logprobs) < below. SAE (arXiv 2601.07320) with below = 0.2 and every = 1;
    SPO-chain (arXiv 2505.23564) with 0.9 and 5. That the unlikely token starts the action, rather
    than ends the one before, is the convention of SPO.

    Args:
        response_mask: [batch, response] bool.
        old_logprobs: [batch, response] float, of the policy at rollout; anything on padding.
        below: probability in (0, 1].
        every: n.
    """
    unlikely = (old_logprobs < math.log(below)) & response_mask
    return given(response_mask, unlikely & ((unlikely.cumsum(1) - 1) % every == 0))


def entropy(response_mask: Tensor, entropies: Tensor, *, share: float) -> Tensor:
    """End an action at the tokens of highest entropy: ceil(share * length) of each response.

    Segment-Aligned PO (arXiv 2605.01327) with share = 0.3. Of equal entropies the first counts.

    Args:
        response_mask: [batch, response] bool.
        entropies: [batch, response] float, of the policy at rollout; anything on padding.
        share: of the response's tokens, in (0, 1].
    """
    ranked = torch.where(response_mask, entropies, -torch.inf)
    ranks = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    # 7 % of 100 tokens are 7, not 8 because 0.07 * 100 > 7 in floating point.
    num_ends = (response_mask.sum(1, keepdim=True).double() * share - 1e-9).ceil()
    return given(response_mask, (ranks < num_ends).roll(1, 1))


def post_process(
    starts: Tensor,
    response_mask: Tensor,
    *,
    min_length: int = 1,
    max_length: int | None = None,
    eos: EosRule = "join",
    ends_with_eos: Tensor | None = None,
) -> Tensor:
    """Merge short actions, split long ones, and give EOS an action of its own, in this order.

    Args:
        starts: [batch, response] bool from a rule.
        response_mask: [batch, response] bool.
        min_length: an action with fewer tokens is merged into the previous one, if any.
        max_length: an action with more tokens is split every `max_length` tokens; None means no
            limit.
        eos: "join" leaves EOS in the action of the rule; "own" makes it an action of its own.
        ends_with_eos: [batch] bool, needed for "own": responses whose last token is EOS.
    """
    if min_length < 1:
        raise ValueError(f"macro.min_length={min_length}: must be at least 1.")
    if max_length is not None and max_length < min_length:
        raise ValueError(
            f"macro.max_length={max_length}: must be at least macro.min_length={min_length}."
        )
    check_choice("eos", eos, EosRule)
    starts = given(response_mask, starts)
    positions = _positions(response_mask)
    if min_length > 1:
        starts = given(
            response_mask, starts & (_next_start(starts, response_mask) - positions >= min_length)
        )
    if max_length is not None:
        first = torch.where(starts, positions, 0).cummax(1).values
        starts = ((positions - first) % max_length == 0) & response_mask
    if eos == "own":
        assert ends_with_eos is not None
        starts = starts | (_is_last(response_mask) & ends_with_eos.unsqueeze(1))
    return starts


def _next_start(starts: Tensor, response_mask: Tensor) -> Tensor:
    """Position of the next action's start after each token, or the length of the response."""
    lengths = response_mask.sum(1, keepdim=True)
    later = torch.where(starts, _positions(starts), lengths).roll(-1, 1)
    later[:, -1:] = lengths
    return later.flip(1).cummin(1).values.flip(1)


def _positions(response_mask: Tensor) -> Tensor:
    return torch.arange(response_mask.size(1), device=response_mask.device)


def _is_last(response_mask: Tensor) -> Tensor:
    return response_mask & (_positions(response_mask) == response_mask.sum(1, keepdim=True) - 1)
