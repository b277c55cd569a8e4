"""Preference losses against worked numbers, loops, and TRL's formulas written out again."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.preference_losses import (
    bfpo_terms,
    cpl_terms,
    dpo_terms,
    held_out_columns,
    ipo_md_terms,
    ipo_terms,
    nash_md_terms,
    pair_output,
    pro_terms,
    refuel_terms,
    segment_discounts,
    xpo_terms,
)
from tests.unit.algorithm.macro_oracles import lengths_of, masks, noise, responses


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def one(terms):
    (value,) = terms.tolist()
    return value


def test_worked_dpo_with_and_without_label_smoothing():
    lead = vector(0.8)
    assert one(dpo_terms(lead, beta=0.1)) == pytest.approx(math.log1p(math.exp(-0.08)), abs=1e-9)
    assert one(dpo_terms(lead, beta=0.1)) == pytest.approx(0.653947, abs=5e-7)
    smooth = dpo_terms(lead, beta=0.1, label_smoothing=0.1)
    assert one(smooth) == pytest.approx(0.661947, abs=5e-7)
    assert one(smooth) == pytest.approx(math.log1p(math.exp(-0.08)) + 0.1 * 0.08, abs=1e-9)


def test_an_offset_asks_for_more():
    found = dpo_terms(vector(0.8, 0.8), beta=0.1, offset=vector(0.0, 0.3))
    expected = [math.log1p(math.exp(-0.08)), math.log1p(math.exp(0.22))]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_worked_ipo_of_sums_and_of_means():
    assert one(ipo_terms(vector(0.8), tau=0.1)) == pytest.approx(17.64, abs=1e-9)
    lead = vector(1.0) / 5 - vector(0.2) / 4
    assert one(ipo_terms(lead, tau=0.1)) == pytest.approx(23.5225, abs=1e-9)


def test_worked_refuel():
    lead = vector(0.3) - vector(-0.1)
    assert one(refuel_terms(lead, vector(0.9 - 0.4), eta=1.0)) == pytest.approx(0.01, abs=1e-9)


@pytest.mark.parametrize(("bias", "expected"), [(0.5, 0.943249), (1.0, 0.644397)])
def test_worked_cpl(bias, expected):
    found = one(cpl_terms(vector(-10.0), vector(-11.0), alpha=0.1, bias=bias))
    assert found == pytest.approx(expected, abs=5e-7)
    assert found == pytest.approx(math.log1p(math.exp(1 - 1.1 * bias)), abs=1e-9)


def test_worked_pro():
    scores, rewards = vector(-1.0, -1.2, -1.5)[None], vector(2.0, 1.0, 0.5)[None]
    found = one(pro_terms(scores, rewards))
    assert found == pytest.approx(1.658483, abs=1e-6)
    first = math.log(math.exp(-1.5) + math.exp(-1.2) + math.exp(-2.25)) + 1.5
    second = math.log(math.exp(-0.6) + math.exp(-0.75)) + 0.6
    assert (first, second) == pytest.approx((1.037526, 0.620957), abs=1e-6)
    assert found == pytest.approx(first + second, abs=1e-9)


@given(st.integers(1, 4), st.integers(2, 5))
def test_pro_and_its_gradient_agree_with_a_loop(count, size):
    scores = noise(6, count, size).requires_grad_()
    rewards = noise(7, count, size).sort(1, descending=True).values
    expected = 0.0
    for s, r in zip(scores, rewards.tolist(), strict=True):
        for k in range(size - 1):
            top = s[k] * max(r[k] - r[j] for j in range(k + 1, size))
            rest = sum((s[j] * (r[k] - r[j])).exp() for j in range(k + 1, size))
            expected = expected + (top.exp() + rest).log() - top
    found = pro_terms(scores, rewards).sum()
    ours, theirs = (torch.autograd.grad(loss, scores)[0] for loss in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_worked_bfpo():
    safe = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]], dtype=torch.float64)
    found = bfpo_terms(vector(0.8).expand(4), safe, beta=0.1, factor=3.0, shift=0.5)
    assert found.tolist() == pytest.approx([17.64, 84.64, 116.64, 33.64], abs=1e-9)


def test_worked_ipo_md_and_what_it_expects_of_ipo():
    """P .7, tau .1, D .8: (.8 - 2)^2. Who is preferred is drawn in IPO: its mean is the same but
    for a constant, whatever D is."""
    assert one(ipo_md_terms(vector(0.8), vector(0.7), tau=0.1)) == pytest.approx(1.44, abs=1e-9)
    assert one(ipo_md_terms(vector(-0.8), vector(0.3), tau=0.1)) == pytest.approx(1.44, abs=1e-9)
    constants = [
        0.7 * one(ipo_terms(vector(lead), tau=0.1))
        + 0.3 * one(ipo_terms(vector(-lead), tau=0.1))
        - one(ipo_md_terms(vector(lead), vector(0.7), tau=0.1))
        for lead in (0.8, -2.0, 5.0)
    ]
    assert constants == pytest.approx([constants[0]] * 3, abs=1e-9)


def test_worked_nash_md():
    """log pi -1 -2, reference -1.5 -1.8, P .7, beta .1: -.2 * -3 + .1 (.5 * -1 - .2 * -2) = .59,
    and the gradient -.2 + .1 * .5, -.2 - .1 * .2."""
    logprobs = torch.tensor([[-1.0, -2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-1.5, -1.8, 0.0]], dtype=torch.float64)
    terms = nash_md_terms(logprobs, reference, vector(0.7), beta=0.1)
    assert one(terms) == pytest.approx(0.59, abs=1e-9)
    terms.sum().backward()
    assert logprobs.grad[0].tolist() == pytest.approx([-0.15, -0.22, -0.2], abs=1e-9)


def test_nash_md_and_ipo_md_are_loops():
    generator = torch.Generator().manual_seed(3)
    ours, reference = -3 * torch.rand(2, 5, 7, generator=generator).double()
    preference, lead = torch.rand(2, 5, generator=generator).double()
    nash = nash_md_terms(ours, reference, preference, beta=0.3)
    ipo = ipo_md_terms(lead, preference, tau=0.2)
    for pair in range(5):
        total = 0.0
        for a, b in zip(ours[pair].tolist(), reference[pair].tolist(), strict=True):
            total += 0.3 * (a - b) * a - (preference[pair].item() - 0.5) * a
        assert nash[pair].item() == pytest.approx(total, abs=1e-9)
        wanted = (lead[pair].item() - (preference[pair].item() - 0.5) / 0.2) ** 2
        assert ipo[pair].item() == pytest.approx(wanted, abs=1e-9)


def test_xpo_is_dpo_and_what_pushes_the_response_of_the_reference_down():
    explored = vector(-12.0).requires_grad_()
    found = xpo_terms(vector(0.8), explored, beta=0.1, alpha=0.01)
    assert one(found) == pytest.approx(math.log1p(math.exp(-0.08)) - 0.12, abs=1e-9)
    (slope,) = torch.autograd.grad(found.sum(), explored)
    assert slope.item() == pytest.approx(0.01)  # so that a descent lowers S


@given(responses(), st.floats(0.5, 1))
def test_discounts_count_macro_actions(rows, gamma):
    starts, mask = masks(rows)
    assume(mask.any())
    found = segment_discounts(MacroActions.from_starts(starts, mask), gamma)
    for row, flags, weights in zip(range(len(rows)), rows, found.tolist(), strict=True):
        lengths = lengths_of(flags) if flags else []
        expected = [gamma**k for k, length in enumerate(lengths) for _ in range(length)]
        assert weights == pytest.approx(expected + [0] * (mask.shape[1] - len(expected))), row


def test_discounts_of_single_tokens_and_of_whole_responses_are_the_limits():
    mask = torch.ones(1, 4).bool()
    tokens, whole = mask, torch.tensor([[True, False, False, False]])
    found = [
        segment_discounts(MacroActions.from_starts(starts, mask), 0.5)[0].tolist()
        for starts in (tokens, whole)
    ]
    assert found == [[1, 0.5, 0.25, 0.125], [1, 1, 1, 1]]


@given(st.integers(1, 5), st.floats(0.01, 2), st.floats(0, 0.49))
def test_dpo_and_its_gradient_are_those_of_trl(num_pairs, beta, epsilon):
    """TRL writes the four log-probs and the log-sigmoids out, pair by pair."""
    policy = (3 * noise(1, num_pairs, 2)).requires_grad_()
    reference = 3 * noise(2, num_pairs, 2)
    expected = 0.0
    for (chosen, rejected), (ref_chosen, ref_rejected) in zip(policy, reference, strict=True):
        logits = beta * ((chosen - rejected) - (ref_chosen - ref_rejected))
        log_sigmoid, opposite = -torch.log1p((-logits).exp()), -torch.log1p(logits.exp())
        expected = expected - (1 - epsilon) * log_sigmoid - epsilon * opposite
    ratios = policy - reference
    lead = ratios[:, 0] - ratios[:, 1]
    found = dpo_terms(lead, beta=beta, label_smoothing=epsilon).sum()
    assert found.item() == pytest.approx(expected.item(), abs=1e-9)
    ours, theirs = (torch.autograd.grad(loss, policy)[0] for loss in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 5), st.floats(0.01, 2), st.floats(0.1, 1))
def test_cpl_and_its_gradient_agree_with_a_loop(num_pairs, alpha, bias):
    sums = (3 * noise(5, num_pairs, 2)).requires_grad_()
    expected = sum(-torch.log(1 / (1 + (-alpha * (w - bias * l)).exp())) for w, l in sums)  # noqa: E741
    found = cpl_terms(sums[:, 0], sums[:, 1], alpha=alpha, bias=bias).sum()
    ours, theirs = (torch.autograd.grad(loss, sums)[0] for loss in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(st.integers(1, 5), st.floats(0.05, 2))
def test_squared_losses_and_their_gradients_agree_with_loops(num_pairs, scale):
    lead, target = noise(3, num_pairs).requires_grad_(), noise(4, num_pairs)
    ipo = sum((x - 1 / (2 * scale)) ** 2 for x in lead)
    refuel = sum((x - scale * t) ** 2 for x, t in zip(lead, target, strict=True))
    safe = noise(5, num_pairs, 2) > 0
    labels = [((1 + scale) * int(w) - int(r)) / scale for w, r in safe.tolist()]
    bfpo = sum((x - (y - 0.3) / 0.2) ** 2 for x, y in zip(lead, labels, strict=True))
    found = bfpo_terms(lead, safe.double(), beta=0.2, factor=1 + scale, shift=0.3)
    pairs = (
        (found.sum(), bfpo),
        (ipo_terms(lead, tau=scale).sum(), ipo),
        (refuel_terms(lead, target, eta=scale).sum(), refuel),
    )
    for found, expected in pairs:
        ours, theirs = (torch.autograd.grad(loss, lead)[0] for loss in (found, expected))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_ties_count_half_and_the_margin_is_the_lead_over_the_best_of_the_others():
    rewards = torch.tensor([[1.0, 0.5, 0.75], [0.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    found = held_out_columns(vector(1.0, 2.0, 3.0), rewards)
    assert found["accuracy"].tolist() == [1.0, 0.5, 0.0]
    assert found["margin"].tolist() == [0.25, 0.0, -2.0]
    assert found["loss"].tolist() == [1.0, 2.0, 3.0]


def test_pairs_that_only_fill_a_microbatch_count_nowhere():
    losses, rewards = vector(1.0, 2.0, 4.0), vector(1.0, 0.5, 0.0, 2.0, 9.0, 9.0).view(3, 2)
    mask = torch.tensor([True, True, False])
    found = pair_output(losses.requires_grad_(), rewards, vector(0.1, 0.3, 7.0), mask)
    assert (found.loss_sum.item(), found.count.item()) == (3.0, 2.0)
    assert torch.autograd.grad(found.loss_sum, losses)[0].tolist() == [1.0, 1.0, 0.0]
    means = {name: (total / count).item() for name, (total, count) in found.metrics.items()}
    assert means == pytest.approx(
        {
            "accuracy": 0.5,
            "margin": -0.75,
            "nll": 0.2,
            "chosen_reward": 0.5,
            "rejected_reward": 1.25,
        }
    )
