"""VinePPO: worked numbers, and a loop over random segments."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.algorithm.continuations import continuation_advantages, continuation_values
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.termination import probability
from tests.unit.algorithm.macro_oracles import noise

SUMS = {"value_rule": "equal", "macro_reward": "sum", "discount": "per_macro"}


def test_worked_advantages_of_a_chain():
    """Cuts at the prompt and before the tokens 2 and 3; four, six and five of nine succeed."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    actions = MacroActions.from_starts(torch.tensor([[True, False, True, True]]), mask)
    scores = torch.tensor([1.0] * 3 + [0.0] * 6 + [1.0] * 5 + [0.0] * 4 + [1.0] * 6 + [0.0] * 3)
    places = torch.arange(3).repeat_interleave(9)
    values = continuation_values(scores.double(), places, actions)
    assert values[0].tolist() == pytest.approx([3 / 9, 5 / 9, 6 / 9], abs=1e-9)
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    found = continuation_advantages(rewards, values, actions, gamma=1.0, **SUMS)
    assert found[0].tolist() == pytest.approx([2 / 9, 1 / 9, 3 / 9], abs=1e-9)
    per_token = actions.spread(found)
    assert per_token[0].tolist() == pytest.approx([2 / 9, 2 / 9, 1 / 9, 3 / 9], abs=1e-9)
    packed = actions.pack()
    again = continuation_advantages(rewards[mask], values, packed, gamma=1.0, **SUMS)
    assert again.tolist() == found.tolist()


def test_unlikely_tokens_start_the_segments_of_spo():
    """Every second of the cuts 0, 2 and 4 of its example, with values 4/9 and 6/9."""
    likely = torch.tensor([[0.95, 0.3, 0.99, 0.6, 0.97, 0.2, 0.92]], dtype=torch.float64)
    mask = torch.ones_like(likely, dtype=torch.bool)
    starts = probability(mask, likely.log(), below=0.9)
    assert starts[0].nonzero().flatten().tolist() == [0, 1, 3, 5]
    actions = MacroActions.from_starts(starts & (torch.arange(7) != 3), mask)
    values = torch.tensor([[4 / 9, 4 / 9, 6 / 9]], dtype=torch.float64)
    rewards = torch.zeros_like(likely)
    rewards[0, -1] = 1.0
    found = continuation_advantages(rewards, values, actions, gamma=1.0, **SUMS)
    expected = [0.0, *[2 / 9] * 4, *[3 / 9] * 2]
    assert actions.spread(found)[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_continuations_without_a_score_do_not_count():
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    actions = MacroActions.from_starts(mask, mask)
    scores = torch.tensor([2.0, math.nan, math.nan, math.nan, 4.0])
    values = continuation_values(scores, torch.tensor([0, 0, 1, 1, 2]), actions)
    assert values[0, 0] == 2.0
    assert values[0, 1].isnan()
    assert values[1:].tolist() == [[4.0, 0.0], [0.0, 0.0]]


@given(st.integers(0, 10**6))
def test_advantages_are_those_of_a_loop_over_random_segments(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 7, (3,), generator=generator)
    mask = torch.arange(6) < lengths[:, None]
    starts = (torch.rand(3, 6, generator=generator) < 0.4) | (torch.arange(6) == 0)
    actions = MacroActions.from_starts(starts & mask, mask)
    rewards, scores = noise(seed, 3, 6) * mask, noise(seed + 1, 40)
    places = torch.arange(40) % max(actions.lengths.numel(), 1)
    places = (
        places[actions.lengths.flatten()[places] > 0] if actions.lengths.numel() else places[:0]
    )
    scores = scores[: len(places)]
    values = continuation_values(scores, places, actions)
    found = continuation_advantages(rewards, values, actions, gamma=0.9, **SUMS)
    width = actions.lengths.size(1)
    for row in range(3):
        ids = actions.ids[row].tolist()
        count = max(ids) + 1
        worth = [
            [s for s, p in zip(scores.tolist(), places.tolist(), strict=True) if p == k]
            for k in range(row * width, row * width + count)
        ]
        worth = [sum(each) / len(each) for each in worth] + [0.0]
        for k in range(count):
            reward = sum(rewards[row, t].item() for t in range(6) if ids[t] == k)
            expected = reward + 0.9 * worth[k + 1] - worth[k]
            assert found[row, k].item() == pytest.approx(expected, abs=1e-9)
        assert found[row, count:].abs().sum() == 0
