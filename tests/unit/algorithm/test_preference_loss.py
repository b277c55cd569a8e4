import math

import pytest
import torch
from macro_oracles import noise

from marlhf_mega.algorithm.losses import preference_loss, preference_span_loss


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
