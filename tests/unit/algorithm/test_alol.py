import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.algorithm.alol import (
    importance_weights,
    offline_loss,
    sampling_probabilities,
)
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.termination import whole_response
from tests.unit.algorithm.macro_oracles import noise

LOGPROBS = torch.tensor([[-1.0, -2.0, math.nan], [-0.5, -0.5, -3.0]], dtype=torch.float64)
REF = torch.tensor([[-1.5, -1.8, math.nan], [-0.5, -1.0, -2.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, True, True]])
REWARDS = torch.tensor([0.75, 0.25], dtype=torch.float64)
VALUES = torch.tensor([0.25, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("nll", 3 + 4),
        ("wbc", 0.75 * 3 + 0.25 * 4),
        (
            "r_gold",
            0.75 * (math.exp(-1) * 1 + math.exp(-2) * 2)
            + 0.25 * (2 * math.exp(-0.5) * 0.5 + 0.1 * 3),
        ),
        ("r_lol", 0.75 * 1.2 * 3 + 0.25 * 0.8 * 4),  # weights exp(.3) and exp(-.5), clipped
        ("a_lol", 0.5 * 1.2 * 3),
        ("a_lol_seq", 0.5 * (1.2 * 1 + math.exp(-0.2) * 2)),
        ("a_lol_ref_free", 0.5 * 3),
        ("a_lol_kl", 0.5 * 3 + 0.1 * (0.3 - 0.5)),
    ],
)
def test_losses_on_worked_numbers(algorithm, expected):
    found = offline_loss(
        algorithm,
        LOGPROBS,
        REF,
        MASK,
        rewards=REWARDS,
        values=VALUES,
        clip_range=0.2,
        kl_coef=0.1,
    )
    assert found.loss_sum.item() == pytest.approx(expected)
    assert found.count.item() == 2
    assert found.metrics["advantage"][0].item() == pytest.approx(0.25)
    assert found.metrics["kl"][0].item() == pytest.approx(-0.2)


def test_unclamped_advantages_push_bad_responses_down():
    found = offline_loss(
        "a_lol_ref_free",
        LOGPROBS,
        REF,
        MASK,
        rewards=REWARDS,
        values=VALUES,
        compat="lol_rl",
    )
    assert found.loss_sum.item() == pytest.approx(0.5 * 3 - 0.25 * 4)


def test_macro_ratios_on_worked_numbers():
    """Responses of actions [2] and [1, 2]; only the second has a positive advantage."""
    actions = MacroActions.from_ids(torch.tensor([[0, 0, -1], [0, 1, 1]]))
    found = macro_loss(actions, clip_range=0.45)
    # Log-ratios 0 and 0.5 - 1: 1 * 0.5 and exp(-0.5) = 0.61 * 3.5.
    assert found.loss_sum.item() == pytest.approx(0.25 * (0.5 + math.exp(-0.5) * 3.5), abs=1e-9)
    clipped = macro_loss(actions, clip_range=0.3)
    assert clipped.loss_sum.item() == pytest.approx(0.25 * (0.5 + 0.7 * 3.5), abs=1e-9)


def macro_loss(actions, algorithm="a_lol_macro", **options):
    rewards = torch.tensor([0.0, 0.75], dtype=torch.float64)
    return offline_loss(
        algorithm, LOGPROBS, REF, MASK, rewards=rewards, values=VALUES, actions=actions, **options
    )


@pytest.mark.parametrize("clip_range", [None, 0.3])
def test_the_limits_of_macro_ratios_are_those_of_tokens_and_of_responses(clip_range):
    for starts, algorithm in ((MASK, "a_lol_seq"), (whole_response(MASK), "a_lol")):
        actions = MacroActions.from_starts(starts, MASK)
        found = macro_loss(actions, clip_range=clip_range).loss_sum
        assert found == macro_loss(None, algorithm, clip_range=clip_range).loss_sum


@given(st.integers(0, 10**6))
def test_macro_ratios_are_those_of_a_loop_over_random_segments(seed):
    generator = torch.Generator().manual_seed(seed)
    logprobs, ref = noise(seed, 3, 6), noise(seed + 1, 3, 6)
    rewards, values = noise(seed + 2, 2, 3)
    lengths = torch.randint(0, 7, (3,), generator=generator)
    mask = torch.arange(6) < lengths[:, None]
    starts = (torch.rand(3, 6, generator=generator) < 0.4) | (torch.arange(6) == 0)
    actions = MacroActions.from_starts(starts & mask, mask)
    found = offline_loss(
        "a_lol_macro",
        logprobs,
        ref,
        mask,
        rewards=rewards,
        values=values,
        actions=actions,
        clip_range=0.6,
    ).loss_sum
    expected = 0.0
    for row in range(3):
        ids = actions.ids[row].tolist()
        for action in set(ids) - {-1}:
            tokens = [t for t in range(6) if ids[t] == action]
            gap = sum((logprobs - ref)[row, t].item() for t in tokens)
            weight = min(max(math.exp(gap), 0.4), 1.6)
            likelihood = sum(logprobs[row, t].item() for t in tokens)
            expected -= max((rewards - values)[row].item(), 0) * weight * likelihood
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_weights_carry_no_gradient():
    logprobs = noise(1, 2, 3).requires_grad_()
    loss = offline_loss(
        "a_lol", logprobs, REF, MASK, rewards=REWARDS, values=VALUES, clip_range=None
    )
    loss.loss_sum.backward()
    weight = importance_weights(logprobs, REF, MASK)[0].item()
    torch.testing.assert_close(
        logprobs.grad, torch.tensor([[-0.5 * weight] * 2 + [0.0], [0.0] * 3]).double()
    )


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("good_priority", [0.0, 0.75, 0.25]),
        ("good_random", [0.0, 0.5, 0.5]),
        ("all_priority", [0.0, 0.6, 0.2, 0.2, 0.0, 0.0]),
    ],
)
def test_sampling_probabilities(strategy, expected):
    advantages = torch.tensor([-1.0, 3.0, 1.0, 1.0, -2.0, 0.0][: len(expected)])
    assert sampling_probabilities(advantages, strategy).tolist() == pytest.approx(expected)


def test_nothing_is_drawn_when_no_advantage_is_positive():
    assert sampling_probabilities(torch.tensor([-1.0, 0.0]), "good_priority").tolist() == [0.0, 0.0]
