import math
from typing import get_args

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from marlhf_mega.algorithm.advantages import macro_advantages
from marlhf_mega.algorithm.choices import Aggregation
from marlhf_mega.algorithm.losses import (
    entropy_loss,
    kl_loss,
    log_ratios,
    over_budget,
    policy_loss,
    preference_loss,
    preference_span_loss,
    sampler_mask,
    sampler_weights,
    sft_loss,
    value_loss,
)
from marlhf_mega.algorithm.macro_actions import MacroActions, value_weights
from marlhf_mega.algorithm.termination import fixed_ngram, whole_response
from tests.unit.algorithm.macro_oracles import lengths_of, masks, noise, responses, weights_of

AGGREGATIONS = list(get_args(Aggregation))
RATIOS = ["token", "macro", "macro_geo"]


def one_action(length):
    mask = torch.ones(1, length, dtype=torch.bool)
    return MacroActions.from_starts(whole_response(mask), mask)


def test_worked_ratios():
    new, old = torch.tensor([[0.05, -0.02, 0.10]]), torch.zeros(1, 3)
    found = {r: log_ratios(new, old, one_action(3), r)[0].exp().tolist() for r in RATIOS}
    assert found["token"] == pytest.approx([1.0513, 0.9802, 1.1052], abs=5e-5)
    assert found["macro"] == pytest.approx([1.1388] * 3, abs=5e-5)
    assert found["macro_geo"] == pytest.approx([1.0443] * 3, abs=5e-5)


@pytest.mark.parametrize(
    ("aggregation", "loss"),
    [("token_mean", 0.159061), ("seq_mean_token_mean", -0.061722), ("seq_sum_const", 0.039765)],
)
def test_worked_aggregations(aggregation, loss):
    """Responses of two and of three tokens, of at most ten."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    log_ratio = torch.tensor([[0.05, 0.3, 0.0], [-0.3, 0.1, 0.2]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, 1.0, 0.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    actions = MacroActions.from_starts(mask, mask)
    found = policy_loss(
        log_ratio,
        torch.zeros(2, 3, dtype=torch.float64),
        advantages,
        actions,
        aggregation=aggregation,
        clip_range_high=0.28,
    )
    if aggregation == "seq_sum_const":
        found = over_budget(found, 10)
        # Tokens 1.35 and 0.74 are clipped, of a budget of 20.
        clipped, of = found.metrics["clip_fraction"]
        assert (clipped.item(), of.item()) == (2, 20)
    assert (found.loss_sum / found.count).item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(("ratio", "clipped"), [("token", 1), ("macro", 3), ("macro_geo", 0)])
def test_worked_clipping(ratio, clipped):
    new = torch.tensor([[0.05, -0.02, 0.10]])
    found = policy_loss(
        new, torch.zeros(1, 3), torch.ones(1, 3), one_action(3), ratio=ratio, clip_range=0.1
    )
    total, count = found.metrics["clip_fraction"]
    assert (total.item(), count.item()) == (clipped, 3)


@pytest.mark.parametrize(
    ("ratio", "weights"),
    # the trainer finds the tokens 2, 1/4 and 1 times as likely as the sampler did
    [("token", [1.5, 0.25, 1.0]), ("macro", [0.5] * 3), ("macro_geo", [0.5 ** (1 / 3)] * 3)],
)
def test_worked_sampler_weights(ratio, weights):
    sampled = torch.full((1, 3), -3.0, dtype=torch.float64)
    old = sampled + torch.tensor([[2.0, 0.25, 1.0]], dtype=torch.float64).log()
    found = sampler_weights(old, sampled, one_action(3), ratio=ratio, cap=1.5)
    assert found[0].tolist() == pytest.approx(weights)


@pytest.mark.parametrize(
    ("unit", "kept"),
    # Ratios 4, 1, 1/2 and 1/4, 2, in actions of 2, 1 and 2 tokens: geometric means 2, 1/2, 0.707;
    # the whole response is at 1.
    [
        ("token", [False, True, True, False, True]),
        ("macro", [False, False, True, True, True]),
        ("sequence", [True] * 5),
    ],
)
def test_worked_sampler_mask(unit, kept):
    ratios = torch.tensor([[4.0, 1.0, 0.5, 0.25, 2.0, 9.0]], dtype=torch.float64)
    starts = torch.tensor([[True, False, True, True, False, False]])
    mask = torch.tensor([[True] * 5 + [False]])
    actions = MacroActions.from_starts(starts, mask)
    sampled = torch.full((1, 6), -3.0, dtype=torch.float64)
    old = sampled + ratios.log()
    options = {"unit": unit, "bounds": (0.4999, 1.9999 if unit == "macro" else 2.0001)}
    found = sampler_mask(old, sampled, actions, **options)
    assert found.tolist() == [[*kept, False]]
    packed = sampler_mask(old[mask], sampled[mask], actions.pack(), **options)
    assert packed.tolist() == kept


def test_worked_dapo():
    """Clip-higher, over all tokens of the batch or of each response."""
    rows = [[0.05, 0.3], [-0.3, 0.1, 0.2]]
    mask = torch.arange(3) < torch.tensor([[2], [3]])
    actions = MacroActions.from_starts(mask, mask)
    new = torch.tensor([rows[0] + [0.0], rows[1]], dtype=torch.float64)
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 3)
    for aggregation, expected in (("token_mean", 0.159061), ("seq_mean_token_mean", -0.061722)):
        found = policy_loss(
            new,
            torch.zeros_like(new),
            signs,
            actions,
            aggregation=aggregation,
            clip_range=0.2,
            clip_range_high=0.28,
        )
        assert (found.loss_sum / found.count).item() == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("log_ratios", "advantage", "loss", "learns"),
    [
        ([0.0003, -0.0001, 0.0004], 2.0, -2.0004, True),
        ([0.05, -0.02, 0.10], 1.0, -1.0004, False),
        ([0.05, -0.02, 0.10], -1.0, math.exp(0.13 / 3), True),
    ],
)
def test_gspo_is_a_geometric_ratio_of_whole_responses(log_ratios, advantage, loss, learns):
    new = torch.tensor([log_ratios], dtype=torch.float64, requires_grad=True)
    found = policy_loss(
        new,
        torch.zeros_like(new),
        torch.full_like(new, advantage),
        one_action(3),
        ratio="macro_geo",
        aggregation="seq_mean_token_mean",
        clip_range=3e-4,
        clip_range_high=4e-4,
    )
    found.loss_sum.backward()
    ratio = math.exp(sum(log_ratios) / 3)
    gradient = -ratio * advantage / 3 if learns else 0.0
    assert found.loss_sum.item() == pytest.approx(loss, abs=1e-7)
    assert new.grad[0].tolist() == pytest.approx([gradient] * 3)


def test_sampler_weights_stay_finite():
    old, sampled = torch.tensor([[0.0, -1e4]]), torch.tensor([[-1e4, 0.0]])
    found = sampler_weights(old, sampled, one_action(2), ratio="token", cap=2.0)
    assert found.tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize(
    ("advantage", "dual_clip", "gain"),
    # ratio 4, clip range 0.2: A > 0 is clipped to 1.2; A < 0 is not, unless dual clipping bounds it
    [(1.0, None, 1.2), (-1.0, None, -4.0), (-1.0, 3.0, -3.0), (1.0, 3.0, 1.2)],
)
def test_dual_clip_bounds_the_loss_of_bad_actions(advantage, dual_clip, gain):
    new = torch.full((1, 2), math.log(4.0), dtype=torch.float64, requires_grad=True)
    advantages = torch.full((1, 2), advantage, dtype=torch.float64)
    old = torch.zeros(1, 2, dtype=torch.float64)
    found = policy_loss(new, old, advantages, one_action(2), dual_clip=dual_clip)
    found.loss_sum.backward()
    assert found.loss_sum.item() == pytest.approx(-2 * gain)
    assert new.grad[0, 0].item() == pytest.approx(4.0 if gain == -4.0 else 0.0)


def test_an_absurd_ratio_does_not_overflow():
    found = policy_loss(
        torch.tensor([[900.0, -900.0]]), torch.zeros(1, 2), -torch.ones(1, 2), one_action(2)
    )
    assert found.loss_sum.isfinite()
    assert found.loss_sum.item() == pytest.approx(math.exp(20) + 0.8, rel=1e-6)


def policy_oracle(rows, new, old, advantages, *, ratio, aggregation):
    """Loss sum and count, token by token."""
    total, tokens, actions, sequences = 0.0, 0, 0, 0
    for row, flags in enumerate(rows):
        first, sequences, tokens = 0, sequences + bool(flags), tokens + len(flags)
        for length in lengths_of(flags):
            block = range(first, first + length)
            log_ratios = [(new[row, t] - old[row, t]).item() for t in block]
            actions, first = actions + 1, first + length
            for t, log_ratio in zip(block, log_ratios, strict=True):
                if ratio != "token":
                    log_ratio = sum(log_ratios) / (length if ratio == "macro_geo" else 1)
                rho, advantage = math.exp(log_ratio), advantages[row, t].item()
                term = -min(rho * advantage, min(max(rho, 0.8), 1.2) * advantage)
                if aggregation == "macro_mean":
                    term /= length
                elif aggregation == "seq_mean_token_mean":
                    term /= len(flags)
                total += term
    counts = {"token_mean": tokens, "macro_mean": actions}
    return total, counts.get(aggregation, sequences)


@given(responses(), st.sampled_from(RATIOS), st.sampled_from(AGGREGATIONS))
def test_policy_loss_agrees_with_loops_in_both_layouts(rows, ratio, aggregation):
    starts, mask = masks(rows)
    assume(mask.any())
    actions = MacroActions.from_starts(starts, mask)
    new, old = 0.2 * noise(1, *mask.shape), 0.2 * noise(2, *mask.shape)
    new.requires_grad_()
    advantages = actions.spread(noise(3, *actions.lengths.shape))
    options = {"ratio": ratio, "aggregation": aggregation}
    found = policy_loss(new, old, advantages, actions, **options)
    expected, count = policy_oracle(rows, new, old, advantages, **options)
    assert found.loss_sum.item() == pytest.approx(expected, abs=1e-10)
    assert found.count.item() == count
    packed = policy_loss(new[mask], old[mask], advantages[mask], actions.pack(), **options)
    assert packed.loss_sum.item() == pytest.approx(expected, abs=1e-10)
    assert packed.count.item() == count
    gradients = [torch.autograd.grad(loss.loss_sum, new)[0] for loss in (found, packed)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][~mask].any()


@given(responses(), st.sampled_from(["token", "macro"]), st.sampled_from(AGGREGATIONS))
def test_value_loss_agrees_with_loops_in_both_layouts(rows, target, aggregation):
    starts, mask = masks(rows)
    assume(mask.any())
    actions = MacroActions.from_starts(starts, mask)
    new, old = noise(1, *mask.shape), noise(2, *mask.shape)
    returns = noise(3, *actions.lengths.shape)
    pool_weights = value_weights(actions, "position", dtype=torch.float64)
    total = 0.0
    for row, flags in enumerate(rows):
        first = 0
        for action, length in enumerate(lengths_of(flags)):
            block = slice(first, first + length)
            v, v_old = new[row, block].tolist(), old[row, block].tolist()
            if target == "macro":
                w = weights_of("position", length)
                v = [sum(a * b for a, b in zip(w, v, strict=True))] * length
                v_old = [sum(a * b for a, b in zip(w, v_old, strict=True))] * length
            for a, b in zip(v, v_old, strict=True):
                goal = returns[row, action].item()
                term = 0.5 * max((a - goal) ** 2, (min(max(a, b - 0.2), b + 0.2) - goal) ** 2)
                if aggregation == "macro_mean":
                    term /= length
                elif aggregation == "seq_mean_token_mean":
                    term /= len(flags)
                total += term
            first += length
    options = {"target": target, "aggregation": aggregation}
    goals = actions.spread(returns)
    found = value_loss(new, old, goals, actions, pool_weights=pool_weights, **options)
    assert found.loss_sum.item() == pytest.approx(total, abs=1e-10)
    packed = value_loss(
        new[mask],
        old[mask],
        goals[mask],
        actions.pack(),
        pool_weights=pool_weights[mask],
        **options,
    )
    assert packed.loss_sum.item() == pytest.approx(total, abs=1e-10)


def test_value_loss_without_clipping_is_half_the_squared_error():
    found = value_loss(
        torch.tensor([[1.0, 3.0]]),
        torch.tensor([[9.0, 9.0]]),
        torch.tensor([[2.0, 2.0]]),
        one_action(2),
        clip_range=None,
    )
    assert (found.loss_sum.item(), found.count.item()) == (1.0, 2.0)
    assert found.metrics["clip_fraction"][0].item() == 0.0


def test_metrics_of_known_ratios():
    new = torch.tensor([[0.0, math.log(2.0)]])
    found = policy_loss(new, torch.zeros(1, 2), torch.ones(1, 2), one_action(2))
    means = {name: (total / count).item() for name, (total, count) in found.metrics.items()}
    assert means["ratio"] == pytest.approx(1.5)
    assert means["clip_fraction"] == 0.5
    assert means["approx_kl"] == pytest.approx((1 - math.log(2.0)) / 2)


MASK = torch.arange(7) < torch.tensor([[7], [4]])


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_policy_gradients_are_exact(ratio, aggregation):
    actions = MacroActions.from_starts(fixed_ngram(MASK, n=3), MASK)
    new, old = noise(4, 2, 7), noise(5, 2, 7)
    advantages = actions.spread(noise(6, 2, 3))
    for dual_clip in (None, 1.5):

        def loss(logprobs, dual_clip=dual_clip):
            return policy_loss(
                logprobs,
                old,
                advantages,
                actions,
                ratio=ratio,
                aggregation=aggregation,
                dual_clip=dual_clip,
            ).loss_sum

        assert torch.autograd.gradcheck(loss, new.requires_grad_())


@pytest.mark.parametrize("target", ["token", "macro"])
def test_value_gradients_are_exact(target):
    actions = MacroActions.from_starts(fixed_ngram(MASK, n=3), MASK)
    old, returns = noise(5, 2, 7), actions.spread(noise(6, 2, 3))
    pool_weights = value_weights(actions, "equal", dtype=torch.float64)

    def loss(values):
        return value_loss(
            values, old, returns, actions, target=target, pool_weights=pool_weights
        ).loss_sum

    assert torch.autograd.gradcheck(loss, noise(4, 2, 7).requires_grad_())


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_entropy_and_kl_gradients_are_exact(estimator):
    actions = MacroActions.from_starts(fixed_ngram(MASK, n=3), MASK)
    ref = noise(5, 2, 7)

    def loss(values):
        divergence = kl_loss(values, ref, actions, estimator=estimator, aggregation="macro_mean")
        return divergence.loss_sum + entropy_loss(values, actions).loss_sum

    assert torch.autograd.gradcheck(loss, noise(4, 2, 7).requires_grad_())


def test_entropy_kl_and_sft_on_worked_numbers_with_nan_padding():
    mask = torch.tensor([[True, True], [True, False]])
    actions = MacroActions.from_starts(whole_response(mask), mask)
    values = torch.tensor([[1.0, 2.0], [4.0, math.nan]])
    entropy = entropy_loss(values, actions, aggregation="seq_mean_token_mean")
    assert (entropy.loss_sum.item(), entropy.count.item()) == (-5.5, 2.0)
    assert entropy.metrics["entropy"][0].item() == 5.5
    divergence = kl_loss(values, torch.zeros(2, 2), actions, estimator="k2")
    assert (divergence.loss_sum.item(), divergence.count.item()) == (10.5, 3.0)
    cross_entropy = sft_loss(-values, mask)
    assert (cross_entropy.loss_sum.item(), cross_entropy.count.item()) == (7.0, 3.0)


def test_single_token_actions_are_token_ppo():
    """An independent token PPO: GAE over tokens, clipped surrogate, clipped value loss."""
    lengths = (9, 5)
    mask = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
    rewards, values = noise(1, 2, 9), noise(2, 2, 9)
    new, old, new_values = 0.3 * noise(3, 2, 9), 0.3 * noise(4, 2, 9), noise(5, 2, 9)
    actions = MacroActions.from_starts(fixed_ngram(mask, n=1), mask)
    macro = macro_advantages(
        rewards,
        values,
        actions,
        value_rule="equal",
        macro_reward="sum",
        gamma=0.99,
        gae_lambda=0.95,
    )
    policy_total, value_total = 0.0, 0.0
    for row, length in enumerate(lengths):
        advantage = 0.0
        for t in reversed(range(length)):
            following = values[row, t + 1] if t + 1 < length else 0.0
            delta = rewards[row, t] + 0.99 * following - values[row, t]
            advantage = delta + 0.99 * 0.95 * advantage
            goal = advantage + values[row, t]
            rho = (new[row, t] - old[row, t]).exp()
            policy_total -= torch.minimum(rho * advantage, rho.clamp(0.8, 1.2) * advantage)
            near = values[row, t] + (new_values[row, t] - values[row, t]).clamp(-0.2, 0.2)
            errors = (new_values[row, t] - goal) ** 2, (near - goal) ** 2
            value_total += 0.5 * torch.maximum(*errors)
    for ratio in RATIOS:
        found = policy_loss(new, old, macro.token_advantages, actions, ratio=ratio)
        torch.testing.assert_close(found.loss_sum, policy_total)
    found = value_loss(new_values, values, macro.token_returns, actions)
    torch.testing.assert_close(found.loss_sum, value_total)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_batch_whose_samples_are_all_masked_contributes_nothing(aggregation):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    actions = MacroActions.from_starts(whole_response(mask), mask)
    tokens = torch.ones(2, 3, requires_grad=True)
    macro = macro_advantages(
        tokens.detach(),
        tokens.detach(),
        actions,
        value_rule="position",
        macro_reward="sum",
        gamma=1.0,
        gae_lambda=0.95,
    )
    policy = policy_loss(
        tokens, tokens.detach() - 1, macro.token_advantages, actions, aggregation=aggregation
    )
    critic = value_loss(
        tokens, tokens.detach(), macro.token_returns, actions, aggregation=aggregation
    )
    (policy.loss_sum + critic.loss_sum).backward()
    assert (policy.loss_sum.item(), policy.count.item()) == (0.0, 0.0)
    assert (critic.loss_sum.item(), critic.count.item()) == (0.0, 0.0)
    assert not tokens.grad.any()


def logsigmoid(x):
    return -math.log1p(math.exp(-x))


def test_bradley_terry_with_margin_soft_labels_and_centering():
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
    plain = preference_loss(chosen, rejected)
    assert plain.loss_sum.item() == pytest.approx(-logsigmoid(1.5) - logsigmoid(-2.0))
    assert plain.count.item() == 2
    means = {name: (total / count).item() for name, (total, count) in plain.metrics.items()}
    assert means == pytest.approx(
        {"accuracy": 0.5, "margin": -0.25, "score": 2.5 / 4, "score_square": 6.25 / 4}
    )
    found = preference_loss(
        chosen,
        rejected,
        margin=torch.tensor([0.5, 0.0]),
        chosen_probability=0.9,
        center_coef=0.1,
    )
    expected = -0.9 * (logsigmoid(1.0) + logsigmoid(-2.0))
    expected += -0.1 * (logsigmoid(-1.0) + logsigmoid(2.0)) + 0.1 * 2.5**2
    assert found.loss_sum.item() == pytest.approx(expected)


def test_span_loss_runs_from_the_first_difference_and_never_reads_padding():
    nan = math.nan
    span = {
        "chosen_tokens": torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [5, 6, 0, 0]]),
        "rejected_tokens": torch.tensor([[5, 9, 0, 0], [5, 6, 7, 0], [5, 6, 0, 0]]),
        "chosen_mask": torch.arange(4) < torch.tensor([[4], [2], [2]]),
        "rejected_mask": torch.arange(4) < torch.tensor([[2], [3], [2]]),
    }
    chosen = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, nan, nan], [1.0, 2.0, nan, nan]])
    rejected = torch.tensor([[0.1, -0.2, nan, nan], [0.5, 0.6, 0.9, nan], [1.0, 2.0, nan, nan]])
    found = preference_span_loss(chosen, rejected, **span)
    # pair 0: positions 1..3, the rejected one keeps its last score -0.2; pair 1: position 2 only;
    # pair 2: equal responses, no span
    expected = -(logsigmoid(0.4) + logsigmoid(0.5) + logsigmoid(0.6)) / 3 - logsigmoid(-0.3)
    assert found.loss_sum.item() == pytest.approx(expected)
    assert found.count.item() == 3
    assert found.metrics["accuracy"][0].item() == 1
    per_pair = preference_span_loss(
        chosen, rejected, margin=torch.tensor([0.0, 0.3, 0.0]), center_coef=1.0, **span
    )
    centring = 0.2**2 + 1.5**2 + 4.0**2
    expected += logsigmoid(-0.3) - logsigmoid(-0.6) + centring
    assert per_pair.loss_sum.item() == pytest.approx(expected)


def test_preference_gradients_are_exact():
    margin, probability = noise(3, 4), torch.tensor([1.0, 0.9, 0.5, 0.1], dtype=torch.float64)

    def last(chosen, rejected):
        return preference_loss(
            chosen, rejected, margin=margin, chosen_probability=probability, center_coef=0.1
        ).loss_sum

    inputs = noise(1, 4).requires_grad_(), noise(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(last, inputs)

    def span(chosen, rejected):
        return preference_span_loss(
            chosen,
            rejected,
            chosen_tokens=torch.tensor([[1, 2, 3], [1, 2, 3]]),
            rejected_tokens=torch.tensor([[1, 4, 0], [2, 4, 5]]),
            chosen_mask=torch.tensor([[True, True, True], [True, True, False]]),
            rejected_mask=torch.tensor([[True, True, False], [True, True, True]]),
            margin=margin[:2],
            chosen_probability=probability[1:3],
            center_coef=0.1,
        ).loss_sum

    inputs = noise(1, 2, 3).requires_grad_(), noise(2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(span, inputs)
