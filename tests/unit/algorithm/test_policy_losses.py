"""CISPO, the plain policy gradient and P3O against worked numbers and loops."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from marlhf_mega.algorithm.losses import policy_loss
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.policy_losses import cispo_loss, p3o_loss, pg_loss
from tests.unit.algorithm.macro_oracles import lengths_of, masks, noise, responses
from tests.unit.algorithm.test_losses import AGGREGATIONS, RATIOS, one_action


def test_worked_cispo():
    new = torch.tensor([[-0.5, -1.2, -0.3]], dtype=torch.float64, requires_grad=True)
    old = new.detach() - torch.tensor([[0.4, -0.1, 0.2]], dtype=torch.float64)
    found = cispo_loss(
        new, old, torch.ones_like(new), one_action(3), clip_range=0.2, clip_range_high=0.28
    )
    found.loss_sum.backward()
    assert found.loss_sum.item() / 3 == pytest.approx(0.697409, abs=5e-7)
    assert new.grad[0].tolist() == pytest.approx([-1.28, -math.exp(-0.1), -math.exp(0.2)])
    assert found.metrics["clip_fraction"][0].item() == 1


@given(responses(), st.sampled_from(RATIOS), st.sampled_from(AGGREGATIONS))
def test_cispo_and_the_policy_gradient_agree_with_loops_in_both_layouts(rows, ratio, aggregation):
    starts, mask = masks(rows)
    assume(mask.any())
    actions = MacroActions.from_starts(starts, mask)
    new, old = 0.2 * noise(1, *mask.shape), 0.2 * noise(2, *mask.shape)
    new.requires_grad_()
    advantages = noise(3, *mask.shape)
    clipped, plain = 0.0, 0.0
    for row, flags in enumerate(rows):
        first = 0
        for length in lengths_of(flags) if flags else []:
            block = range(first, first + length)
            log_ratios = [(new[row, t] - old[row, t]).item() for t in block]
            first += length
            for t, log_ratio in zip(block, log_ratios, strict=True):
                if ratio != "token":
                    log_ratio = sum(log_ratios) / (length if ratio == "macro_geo" else 1)
                share = {"macro_mean": length, "seq_mean_token_mean": len(flags)}
                term = -(advantages[row, t] * new[row, t]).item() / share.get(aggregation, 1)
                plain += term
                clipped += min(max(math.exp(log_ratio), 0.8), 1.3) * term
    options = {"ratio": ratio, "aggregation": aggregation}
    high = {"clip_range": 0.2, "clip_range_high": 0.3}
    found = cispo_loss(new, old, advantages, actions, **options, **high)
    packed = cispo_loss(new[mask], old[mask], advantages[mask], actions.pack(), **options, **high)
    bare = pg_loss(new, advantages, actions, aggregation=aggregation)
    packed_bare = pg_loss(new[mask], advantages[mask], actions.pack(), aggregation=aggregation)
    assert found.loss_sum.item() == pytest.approx(clipped, abs=1e-10)
    assert packed.loss_sum.item() == pytest.approx(clipped, abs=1e-10)
    assert bare.loss_sum.item() == pytest.approx(plain, abs=1e-10)
    assert packed_bare.loss_sum.item() == pytest.approx(plain, abs=1e-10)
    count = policy_loss(new, old, advantages, actions, **options).count
    assert found.count == packed.count == bare.count == packed_bare.count == count


def test_all_objectives_have_the_same_gradient_where_the_policy_is_that_of_the_rollout():
    new, advantages = noise(1, 2, 5).requires_grad_(), noise(2, 2, 5)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    actions = MacroActions.from_starts(mask, mask)
    losses = (
        policy_loss(new, new.detach(), advantages, actions),
        cispo_loss(new, new.detach(), advantages, actions),
        pg_loss(new, advantages, actions),
    )
    first, *others = (torch.autograd.grad(loss.loss_sum, new)[0] for loss in losses)
    for other in others:
        torch.testing.assert_close(other, first)


def pair_loss(present, before, *, scores=(1.2, 0.4), mask=None):
    """P3O on responses of two tokens whose log-ratios to the reference add up to the given sums."""
    halves = [
        torch.tensor([[h / 2] * 2 for h in sums], dtype=torch.float64) for sums in (present, before)
    ]
    new, old = halves[0].requires_grad_(), halves[1]
    mask = torch.ones(2, 2, dtype=torch.bool) if mask is None else mask
    # The return at rollout: the score less the penalty of the rollout's divergence.
    returns = torch.tensor([r - 0.05 * h for r, h in zip(scores, before, strict=True)])
    advantages = returns.double()[:, None].expand(2, 2)
    actions = MacroActions.from_starts(mask, mask)
    found = p3o_loss(new, old, advantages, actions, kl_coef=0.05, clip_range=0.2)
    found.loss_sum.backward()
    return (found.loss_sum / found.count).item(), new.grad, found


@pytest.mark.parametrize(
    ("present", "q", "weight", "loss", "learns"),
    [
        ((0.30, 0.10), 0.79, 1.390968, -0.109886, True),
        ((0.40, 0.10), 0.785, 1.537258, -0.138776, False),
    ],
)
def test_worked_p3o(present, q, weight, loss, learns):
    found, gradient, output = pair_loss(present, (0.05, 0.02))
    # The authors' loss has the pair's difference before the update as well, without a gradient.
    assert found - q * weight * 0.03 / 2 == pytest.approx(loss, abs=2e-6)
    slope = q * weight / 2 if learns else 0.0
    expected = torch.tensor([[-slope] * 2, [slope] * 2], dtype=torch.float64)
    torch.testing.assert_close(gradient / output.count, expected, atol=1e-6, rtol=0)
    assert output.metrics["clip_fraction"][0] == (0 if learns else 2)


def test_p3o_does_not_see_what_both_responses_share():
    plain, gradient, _ = pair_loss((0.3, 0.1), (0.05, 0.02))
    shifted, same, _ = pair_loss((0.3, 0.1), (0.05, 0.02), scores=(11.2, 10.4))
    assert shifted == pytest.approx(plain, abs=1e-5)
    torch.testing.assert_close(same, gradient, atol=1e-5, rtol=0)


def test_a_pair_of_which_one_response_has_no_score_teaches_nothing():
    mask = torch.tensor([[True, True], [False, False]])
    loss, gradient, output = pair_loss((0.3, 0.1), (0.05, 0.02), mask=mask)
    assert (loss, output.count.item(), gradient.any().item()) == (0, 1, False)


@given(st.integers(1, 4), st.integers(0, 100))
def test_p3o_agrees_with_a_loop_over_the_pairs(pairs, seed):
    lengths = [int(n) for n in noise(seed, 2 * pairs).abs() * 2 + 1]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    new, old = 0.3 * noise(seed + 1, *mask.shape), 0.3 * noise(seed + 2, *mask.shape)
    level = noise(seed + 3, 2 * pairs)
    actions = MacroActions.from_starts(mask, mask)
    advantages = level[:, None] * mask
    found = p3o_loss(new, old, advantages, actions, kl_coef=0.1, clip_range=0.2)
    total = 0.0
    for first in range(0, 2 * pairs, 2):
        a, b = (((new - old) * mask)[row].sum().item() for row in (first, first + 1))
        q = (level[first] - level[first + 1]).item() - 0.1 * (a - b)
        factor = -q * min(max(math.exp(a + b), 0.1), 10.0)
        total += max(factor * (a - b), factor * min(max(a - b, -0.2), 0.2)) / 2
    assert (found.loss_sum / found.count).item() == pytest.approx(total / pairs)
    assert found.count == 2 * pairs
