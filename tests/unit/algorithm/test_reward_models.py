"""What is learned from preference pairs besides their loss: hand-worked numbers, brute force."""

import statistics

import pytest
import torch

from marlhf_mega.algorithm.losses import preference_loss
from marlhf_mega.algorithm.reward_models import (
    correlation,
    head_overlap,
    odin_penalty,
    smooth_labels,
)


def test_labels_move_by_a_share_towards_the_model() -> None:
    labels = torch.ones(1, dtype=torch.float64)
    for lead, expected in ((1.0, 0.973106), (1.2, 0.952648)):
        labels = smooth_labels(labels, torch.tensor([lead], dtype=torch.float64), rate=0.1)
        assert labels.item() == pytest.approx(expected, abs=1e-6)


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_length_goes_into_one_score_and_out_of_the_other() -> None:
    """Two pairs, chosen first: the numbers of the paper's terms."""
    lengths = vector(10, 20, 30, 40)
    quality, length = vector(1, 0.5, 2, 1.5), vector(0.1, 0.3, 0.2, 0.6)
    assert correlation(lengths, quality).item() == pytest.approx(0.6, abs=1e-9)
    assert correlation(lengths, length).item() == pytest.approx(0.836660, abs=1e-6)
    pairs = preference_loss(*(quality + length).chunk(2))
    loss = pairs.loss_sum / pairs.count
    assert loss.item() == pytest.approx(1.464172, abs=1e-6)
    total = loss + odin_penalty(lengths, quality, length)
    assert total.item() == pytest.approx(2.227512, abs=1e-6)
    # The released code has one term more, which is not in the paper.
    released = total + correlation(lengths, quality + length).abs()
    assert released.item() == pytest.approx(3.033529, abs=1e-6)


def test_a_correlation_is_that_of_the_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 9, generator=draw, dtype=torch.float64)
    expected = statistics.correlation(one.tolist(), other.tolist())
    assert correlation(one, other).item() == pytest.approx(expected, abs=1e-12)
    assert correlation(one, torch.ones(9, dtype=torch.float64)).item() == 0


def test_orthogonal_heads_do_not_overlap() -> None:
    assert head_overlap(vector(1, 0)[None], vector(0, 5)[None]).item() == 0
    assert head_overlap(vector(3, 4)[None], vector(-4, -3)[None]).item() == pytest.approx(24 / 25)
