"""Statistics of macro actions, by hand."""

import pytest

from marlhf_mega.metrics.macro_actions import MAX_POSITIONS, describe_actions
from marlhf_mega.metrics.writers import Action


def action(length=5, advantage=0.0, value=0.0, kl=0.0):
    return Action(start=0, length=length, advantage=advantage, value=value, kl=kl)


def test_lengths_are_counted_and_positions_averaged_by_hand():
    found = describe_actions(
        [
            [action(5, 1.0, value=0.5, kl=0.25), action(2, -1.0, value=1.0)],
            [action(5, 3.0, value=1.5, kl=0.75)],
            [],  # a response without a score
        ]
    )
    assert found["lengths"] == {"2": 1, "5": 2}
    first, second = found["positions"]
    # 1 and 3: mean 2, standard deviation sqrt(2), error sqrt(2) / sqrt(2).
    assert first == {
        "count": 2,
        "advantage": 2.0,
        "advantage_stderr": pytest.approx(1.0),
        "value": 1.0,
        "kl": 0.5,
    }
    assert second == {"count": 1, "advantage": -1.0, "value": 1.0, "kl": 0.0}


def test_far_positions_count_by_length_only():
    found = describe_actions([[action(1)] * (MAX_POSITIONS + 40)])
    assert found["lengths"] == {"1": MAX_POSITIONS + 40}
    assert len(found["positions"]) == MAX_POSITIONS


def test_a_step_without_scores_has_no_actions():
    assert describe_actions([[], []]) == {"lengths": {}, "positions": []}
    assert describe_actions([]) == {"lengths": {}, "positions": []}


def test_without_a_reference_there_is_no_divergence():
    (position,) = describe_actions([[action(2, 1.0, kl=None)]])["positions"]
    assert position == {"count": 1, "advantage": 1.0, "value": 0.0}


def test_without_a_critic_there_are_no_values():
    (position,) = describe_actions([[action(2, 1.0, value=None)]])["positions"]
    assert position == {"count": 1, "advantage": 1.0, "kl": 0.0}
