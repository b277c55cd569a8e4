import math

import pytest
import torch
from macro_oracles import noise

from marlhf_mega.algorithm.alol import (
    importance_weights,
    offline_loss,
    sampling_probabilities,
)

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
        clamp_advantages=False,
    )
    assert found.loss_sum.item() == pytest.approx(0.5 * 3 - 0.25 * 4)


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
    good, other = torch.tensor([-1.0, 3.0, 1.0]), torch.tensor([1.0, -2.0, 0.0])
    assert sampling_probabilities(good, strategy, other).tolist() == pytest.approx(expected)


def test_nothing_is_drawn_when_no_advantage_is_positive():
    assert sampling_probabilities(torch.tensor([-1.0, 0.0]), "good_priority").tolist() == [0.0, 0.0]
