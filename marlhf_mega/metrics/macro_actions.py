"""What the macro actions of one step were like: how long, and how good at each position."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from marlhf_mega.metrics.writers import Action

MAX_POSITIONS = 100
"""Macro actions further back in a response are counted by length only."""


def describe_actions(responses: Sequence[Sequence[Action]]) -> dict[str, Any]:
    """Return a line of macro_actions.jsonl.

    Args:
        responses: the macro actions of each response; none of one without a score.

    Returns:
        `lengths`: tokens -> how many actions have so many; `positions`: for the first, second, ...
        action of a response the count, the means of advantage, value (absent without a critic) and
        KL (absent without a reference), and the standard error of the advantage (absent for a
        single action).
    """
    lengths = Counter(action.length for actions in responses for action in actions)
    num_positions = min(max(map(len, responses), default=0), MAX_POSITIONS)
    at = [[a[k] for a in responses if k < len(a)] for k in range(num_positions)]
    return {
        "lengths": {str(length): lengths[length] for length in sorted(lengths)},
        "positions": [_position(actions) for actions in at],
    }


def _position(actions: Sequence[Action]) -> dict[str, float]:
    advantages = [action.advantage for action in actions]
    found = {
        "count": len(actions),
        "advantage": fmean(advantages),
    }
    for name in ("value", "kl"):
        known = [x for action in actions if (x := getattr(action, name)) is not None]
        if known:
            found[name] = fmean(known)
    if len(actions) > 1:
        found["advantage_stderr"] = stdev(advantages) / len(actions) ** 0.5
    return {name: float(f"{value:.5g}") for name, value in found.items()}
