"""What is learned from preference pairs besides their loss: hand-worked numbers, brute force."""

import math
import statistics

import pytest
import torch

from marlhf_mega.algorithm.losses import preference_loss
from marlhf_mega.algorithm.reward_models import (
    annealed,
    attend_pairs,
    correlation,
    draw_latent,
    head_overlap,
    latent_kl,
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


def test_a_latent_is_drawn_around_its_mean_and_scaled_to_its_size() -> None:
    """Two users of a latent of two: 0.5 + 1 * 1.5 and 0 + e^0.5 * 0; -1 - 0.5 and 0 + e * 2."""
    mean = torch.stack((vector(0.5, 0.0), vector(-1.0, 0.0)))
    log_variance = torch.stack((vector(0.0, 1.0), vector(0.0, 2.0)))
    noise = torch.stack((vector(1.5, 0.0), vector(-0.5, 2.0)))
    found = draw_latent(mean, log_variance, noise)
    length = math.hypot(1.5, 2 * math.e)
    expected = [[math.sqrt(2), 0], [-1.5 * math.sqrt(2) / length, 2 * math.e * 2**0.5 / length]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9)


def test_the_divergence_of_a_latent_is_that_of_two_normals() -> None:
    """(0.25 + 1 - 1 - 0) / 2 + (0 + e - 1 - 1) / 2, and the library's own."""
    mean, log_variance = vector(0.5, 0.0)[None], vector(0.0, 1.0)[None]
    assert latent_kl(mean, log_variance).item() == pytest.approx(0.125 + (math.e - 2) / 2, abs=1e-9)
    draw = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 3, 5, generator=draw, dtype=torch.float64)
    normals = torch.distributions.Normal(mean, (log_variance / 2).exp())
    standard = torch.distributions.Normal(torch.zeros(3, 5), torch.ones(3, 5))
    expected = torch.distributions.kl_divergence(normals, standard).sum(-1)
    assert torch.allclose(latent_kl(mean, log_variance), expected, rtol=1e-9)


def test_every_pair_of_a_user_attends_to_all_of_them() -> None:
    """Keys 0 and ln 3 for a query of 1 weigh 1/4 and 3/4; the mean of both rows is that."""
    query, key = torch.ones(1, 2, 1).double(), vector(0, math.log(3)).view(1, 2, 1)
    value = vector(4, 8).view(1, 2, 1)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert attend_pairs(query, key, value, mask).item() == pytest.approx(7, abs=1e-9)
    draw = torch.Generator().manual_seed(1)
    query, key, value = torch.randn(3, 4, 5, 3, generator=draw, dtype=torch.float64)
    lengths = [5, 1, 3, 2]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    found = attend_pairs(query, key, value, mask)
    for user, size in enumerate(lengths):
        rows = []
        for i in range(size):
            powers = [math.exp(float(query[user, i] @ key[user, j]) / 3**0.5) for j in range(size)]
            rows.append(sum(p * value[user, j] for j, p in enumerate(powers)) / sum(powers))
        assert torch.allclose(found[user], sum(rows) / size, rtol=1e-9)


def test_the_weight_of_the_divergence_rises_by_half_a_cosine_again_and_again() -> None:
    steps = (0, 1, 2, 3, 4, 6)
    found = [annealed(step, cycle=4) for step in steps]
    root = 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2
    other = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert found == pytest.approx([0.1, root, 0.55, other, 0.1, 0.55], abs=1e-9)
    assert annealed(7, cycle=0) == 1
