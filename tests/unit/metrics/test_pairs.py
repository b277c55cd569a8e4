"""Statistics of held-out pairs: numbers by hand, and a loop over random pairs."""

import math
import random

import pytest

from marlhf_mega.metrics.pairs import (
    Bucket,
    JudgedPair,
    accuracy_by_margin,
    calibration,
    calibration_error,
    score_by_length,
    source_names,
)


def pair(lead, *, tokens=(3, 3), margin=0.0, label=1.0):
    return JudgedPair(
        chosen_score=lead,
        rejected_score=0.0,
        chosen_tokens=tokens[0],
        rejected_tokens=tokens[1],
        margin=margin,
        chosen_probability=label,
        source="a",
    )


def odds(probability):
    return math.log(probability / (1 - probability))


def test_calibration_compares_confidence_with_what_is_right():
    """Bins begin at 50, 55, ... %: two pairs at 62 and 64 %, one of them wrong; one at 80 %."""
    pairs = [pair(odds(0.62)), pair(-odds(0.64)), pair(odds(0.8))]
    first, second = calibration(pairs)
    assert (first.value, first.count, second.value, second.count) == (0.5, 2, 1.0, 1)
    assert (first.position, second.position) == pytest.approx((0.63, 0.8), abs=1e-9)
    expected = 2 / 3 * 0.13 + 1 / 3 * 0.2
    assert calibration_error(pairs) == pytest.approx(expected, abs=1e-9)


def test_soft_labels_ties_and_enormous_scores_have_their_place():
    assert pair(1.0, label=0.75).agreement == 0.75
    assert pair(-1.0, label=0.75).agreement == 0.25
    assert (pair(0.0).agreement, pair(0.0).confidence) == (0.5, 0.5)
    assert pair(-1e6).confidence == 1.0
    assert calibration_error([pair(0.0)]) == 0.0


def test_random_pairs_are_counted_once_each():
    draw = random.Random(0)
    pairs = [pair(draw.gauss(0, 2), label=draw.choice((1.0, 0.0))) for _ in range(200)]
    total = 0.0
    for number in range(10):
        low, high = 0.5 + number / 20, 0.55 + number / 20
        own = [p for p in pairs if low <= p.confidence < high]
        right = sum((p.lead > 0) == (p.chosen_probability == 1) for p in own)
        total += abs(right - sum(p.confidence for p in own)) / 200
    assert calibration_error(pairs) == pytest.approx(total, abs=1e-12)
    assert sum(bucket.count for bucket in calibration(pairs)) == 200


def test_accuracy_and_scores_go_by_quartiles():
    pairs = [pair(lead, margin=m) for lead, m in ((1, 1), (-1, 1), (1, 2), (2, 3), (0, 3), (1, 4))]
    first, second = accuracy_by_margin(pairs)
    assert first == Bucket(pytest.approx(4 / 3), pytest.approx(2 / 3), 3)
    assert second == Bucket(pytest.approx(10 / 3), pytest.approx(2 / 3), 3)
    lengths = [pair(5.0, tokens=(8, 2)), pair(3.0, tokens=(6, 4))]
    assert score_by_length(lengths) == [
        Bucket(2.0, 0.0, 1),
        Bucket(4.0, 0.0, 1),
        Bucket(6.0, 3.0, 1),
        Bucket(8.0, 5.0, 1),
    ]


def test_a_source_has_the_name_of_its_file_unless_two_have_it():
    paths = ["x/easy.jsonl.gz", "y/hard.parquet", "z/hard.jsonl"]
    assert source_names(paths) == {
        "x/easy.jsonl.gz": "easy",
        "y/hard.parquet": "y/hard.parquet",
        "z/hard.jsonl": "z/hard.jsonl",
    }
