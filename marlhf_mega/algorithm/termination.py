"""Termination rules: where macro actions start (MA-RLHF, arXiv 2410.02743, section on termination).

Every rule returns start flags [batch, response] bool, with a start on the first real token of each
row and none on padding. `response_mask` [batch, response] is right padded: True, then False.
Flags are computed once per rollout, after generation, and kept with the sample.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from marlhf_mega.algorithm.counter_rng import fold
from marlhf_mega.algorithm.macro_actions import Compat

RandomMode = Literal["list", "cycle"]
PerplexityForm = Literal["token", "prefix", "segment"]
EosRule = Literal["join", "own"]


def fixed_ngram(response_mask: Tensor, *, n: int) -> Tensor:
    """Start an action every `n` tokens. n=1 is token PPO; n beyond the response is one action."""
    if n < 1:
        raise ValueError(f"macro.n={n}: must be at least 1. Use 1 for token-level PPO.")
    return response_mask & (_positions(response_mask) % n == 0)


def whole_response(response_mask: Tensor) -> Tensor:
    """One action per response, EOS included."""
    return response_mask & (_positions(response_mask) == 0)


def given(response_mask: Tensor, starts: Tensor) -> Tensor:
    """Flags supplied by a parser or an environment; the first token always starts an action."""
    return (starts & response_mask) | whole_response(response_mask)


def sentence(
    response_mask: Tensor, ends_sentence: Tensor, *, ends_with_eos: Tensor | None = None
) -> Tensor:
    """Start an action after every token that ends a sentence.

    Args:
        response_mask: [batch, response] bool.
        ends_sentence: [batch, response] bool, True where the token closes a sentence or a line.
        ends_with_eos: [batch] bool, rows whose last real token is EOS. It carries no text, so it
            stays in the last sentence.
    """
    starts = given(response_mask, ends_sentence.roll(1, 1))
    if ends_with_eos is None:
        return starts
    eos = _is_last(response_mask) & ends_with_eos.unsqueeze(1)
    return starts & (~eos | whole_response(response_mask))


def ngrams_of_lengths(response_mask: Tensor, lengths: Tensor) -> Tensor:
    """Actions of prescribed lengths; tokens after the list is used up form one last action.

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
    """Actions whose lengths come from a shuffled list that holds each length `repeats` times.

    Args:
        response_mask: [batch, response] bool.
        lengths: set of action lengths; the paper uses 2, 3, 5, 10.
        repeats: copies of each length in the list; the paper uses 3.
        mode: "list" uses one shuffled list, its rest forms one long action; "cycle" draws new
            orders until the response ends.
        keys: [batch] int64, one per sample: `fold(seed, step, global sample index)`.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"macro.lengths={list(lengths)}: must name lengths of at least 1 token.")
    if repeats < 1:
        raise ValueError(f"macro.repeats={repeats}: must be at least 1.")
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

    With u = -ref_logprobs, an action starts at t
    token: when u[t] > u[t-1], the token is less likely than the one before;
    prefix: when u[t] > mean(u[0..t-1]), the perplexity of the whole prefix rises;
    segment: when u[t] > mean(u) of the current action, whose own perplexity would rise.

    Args:
        response_mask: [batch, response] bool.
        ref_logprobs: [batch, response] float; entries on padding may be anything.
        form: see above.
        compat: "ma_rlhf" sets the flag of form "token" one token early, as the released code does.
    """
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
    """Running mean inside the current action; sequential in the response, all rows at once."""
    total = torch.zeros_like(surprise[:, 0])
    count = torch.zeros_like(total)
    starts = []
    for current in surprise.unbind(1):
        start = current * count > total
        count = torch.where(start, 1.0, count + 1.0)
        total = torch.where(start, current, total + current)
        starts.append(start)
    return torch.stack(starts, 1)


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
        max_length: an action with more tokens is split every `max_length` tokens; None is no limit.
        eos: "join" leaves EOS in the action that the rule puts it in; "own" makes it an action.
        ends_with_eos: [batch] bool, needed for "own": rows whose last real token is EOS.
    """
    if min_length < 1:
        raise ValueError(f"macro.min_length={min_length}: must be at least 1.")
    if max_length is not None and max_length < min_length:
        raise ValueError(
            f"macro.max_length={max_length}: must be at least macro.min_length={min_length}."
        )
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
    """Position where the action after this token begins, or the length of the response."""
    lengths = response_mask.sum(1, keepdim=True)
    later = torch.where(starts, _positions(starts), lengths).roll(-1, 1)
    later[:, -1:] = lengths
    return later.flip(1).cummin(1).values.flip(1)


def _positions(response_mask: Tensor) -> Tensor:
    return torch.arange(response_mask.size(1), device=response_mask.device)


def _is_last(response_mask: Tensor) -> Tensor:
    return response_mask & (_positions(response_mask) == response_mask.sum(1, keepdim=True) - 1)
