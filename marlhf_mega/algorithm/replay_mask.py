"""Replayed masks: which tokens top-k and top-p left at a position, in bounded memory.

A token that was drawn from a filtered distribution has the probability of that distribution, so
the trainer renormalises over the tokens that the sampler kept. The sampler writes them down as one
row per position: with top-k as int32 ids, -1 where fewer were kept; with top-p alone as one bit per
token of the vocabulary, in uint8.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_POWERS = 2 ** torch.arange(8, dtype=torch.uint8)


def nucleus_mask(
    tokens: Tensor,
    probabilities: Tensor,
    *,
    top_p: float,
    min_kept: int,
    always_kept: Sequence[int] = (),
) -> Tensor:
    """Return which tokens a mask policy leaves to the policy, bool [batch, vocab].

    NLPO (arXiv 2210.01241): the mask policy is an older copy of the policy, which then
    draws from its own distribution, renormalised over the mask policy's smallest set of tokens with
    a probability of `top_p`. As in the released code a set has at least some tokens, and special
    tokens are always in it. Of a policy that is its own mask, with `min_kept=1`, it is plain top-p.

    Args:
        tokens: [batch, vocab] int64 ids, the mask policy's most likely token first.
        probabilities: [batch, vocab] of these tokens by the mask policy.
        top_p: a token stays while those before it have not reached this probability.
        min_kept: so many most likely tokens stay in any case.
        always_kept: ids that stay in any case, such as end tokens.
    """
    kept = probabilities.cumsum(-1) - probabilities < top_p
    kept[:, :min_kept] = True
    kept = torch.zeros_like(kept).scatter_(1, tokens, kept)
    kept[:, list(always_kept)] = True
    return kept


def mask_width(*, top_k: int, vocab_size: int) -> tuple[int, torch.dtype]:
    """Return the columns of a row, and their format.

    Args:
        top_k: 0 means that only top-p filters.
        vocab_size: of the whole vocabulary.
    """
    if top_k:
        return min(top_k, vocab_size), torch.int32
    return -(-vocab_size // 8), torch.uint8


def write_mask(ids: Tensor, kept: Tensor, *, top_k: int, vocab_size: int) -> Tensor:
    """Write down which tokens were kept.

    Args:
        ids: [batch, candidates] int64 token ids.
        kept: [batch, candidates] bool.
        top_k: as in `mask_width`.
        vocab_size: of the whole vocabulary.

    Returns:
        [batch, width] as `mask_width` says.
    """
    if top_k:
        return torch.where(kept, ids, -1).int()
    width, _ = mask_width(top_k=0, vocab_size=vocab_size)
    bits = torch.zeros(len(ids), 8 * width, dtype=torch.uint8, device=ids.device)
    bits.scatter_(1, ids, kept.to(torch.uint8))
    return (bits.view(len(ids), width, 8) * _POWERS.to(ids.device)).sum(-1, dtype=torch.uint8)


def read_mask(rows: Tensor, *, start: int, count: int) -> Tensor:
    """Return bool [tokens, count]: which of the ids start .. start + count - 1 were kept.

    Args:
        rows: [tokens, width] of `write_mask`.
        start: first id wanted.
        count: number of ids wanted.
    """
    if rows.dtype == torch.int32:
        local = rows.long() - start
        inside = (local >= 0) & (local < count)
        mask = torch.zeros(len(rows), count + 1, dtype=torch.bool, device=rows.device)
        return mask.scatter_(1, torch.where(inside, local, count), inside)[:, :count]
    first, last = start // 8, -(-(start + count) // 8)
    bits = rows[:, first:last, None].bitwise_and(_POWERS.to(rows.device)) != 0
    return bits.flatten(1)[:, start - 8 * first :][:, :count]
