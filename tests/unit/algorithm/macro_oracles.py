"""Straight-line Python versions of the maths, one sample and one token at a time."""

import itertools

import torch
from hypothesis import strategies as st


def lengths_of(starts):
    """Lengths of the actions of one response from its list of start flags."""
    firsts = [t for t, start in enumerate(starts) if start] + [len(starts)]
    return [b - a for a, b in itertools.pairwise(firsts)]


def weights_of(rule, length):
    match rule:
        case "equal":
            return [1 / length] * length
        case "unit":
            return [0.0] * (length - 1) + [1.0]
        case "first":
            return [1.0] + [0.0] * (length - 1)
        case "position":
            raw = [1 / (length - i) for i in range(length)]
        case "position_repo":
            raw = [1 / (i + 1) for i in range(length)]
    return [w / sum(raw) for w in raw]


def macro_gae(rewards, values, lengths, *, rule, reward, gamma, lam, per_token, lambda_per_token):
    """One response: (V, R, A, G) per action, by the formulas of the semi-Markov view."""
    macro_values, macro_rewards, first = [], [], 0
    for length in lengths:
        weights = weights_of(rule, length)
        block_values = values[first : first + length]
        block_rewards = rewards[first : first + length]
        macro_values.append(sum(w * v for w, v in zip(weights, block_values, strict=True)))
        if reward == "mean":
            macro_rewards.append(sum(w * r for w, r in zip(weights, block_rewards, strict=True)))
        else:
            rho = gamma if per_token else 1.0
            macro_rewards.append(sum(rho**i * r for i, r in enumerate(block_rewards)))
        first += length
    advantages, after = [0.0] * len(lengths), 0.0
    for k in reversed(range(len(lengths))):
        discount = gamma ** lengths[k] if per_token else gamma
        trace = lam ** lengths[k] if lambda_per_token else lam
        next_value = macro_values[k + 1] if k + 1 < len(lengths) else 0.0
        after = (
            macro_rewards[k] + discount * next_value - macro_values[k] + discount * trace * after
        )
        advantages[k] = after
    returns = [a + v for a, v in zip(advantages, macro_values, strict=True)]
    return macro_values, macro_rewards, advantages, returns


@st.composite
def responses(draw, max_batch=4, max_tokens=12, min_tokens=0):
    """Start flags per response, a list of lists of bool; the first token of each starts."""
    rows = draw(
        st.lists(
            st.lists(st.booleans(), min_size=min_tokens, max_size=max_tokens),
            min_size=1,
            max_size=max_batch,
        )
    )
    return [[True, *row[1:]] if row else [] for row in rows]


def padded(rows, width=None, fill=0):
    """Right pad a list of lists to a tensor."""
    width = max((len(row) for row in rows), default=0) if width is None else width
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows])


def masks(rows, width=None):
    """Start flags and response mask [batch, response] of lists of flags."""
    starts = padded(rows, width, fill=False).bool()
    return starts, padded([[True] * len(row) for row in rows], width, fill=False).bool()


def noise(seed, *shape):
    """Standard normal float64 that depends on the seed only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
