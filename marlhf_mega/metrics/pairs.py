"""What held-out pairs say of a reward model: calibration, accuracy by margin, score by length."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

HELD_OUT_PAIRS = "held_out_pairs.jsonl"
"""In the run directory: the pairs of the last evaluation, in the order of the files."""
NUM_BINS = 10
"""Of confidence, from 50 to 100 %."""
NUM_QUANTILES = 4


@dataclass(frozen=True, kw_only=True)
class JudgedPair:
    """A held-out pair with the scores of its responses: a line of held_out_pairs.jsonl."""

    chosen_score: float
    rejected_score: float
    chosen_tokens: int
    """Tokens of the response."""
    rejected_tokens: int
    margin: float
    """That of the data."""
    chosen_probability: float
    """That of the data, its label."""
    source: str
    """Name of the file."""

    @property
    def lead(self) -> float:
        """By how much the chosen response scores higher."""
        return self.chosen_score - self.rejected_score

    @property
    def confidence(self) -> float:
        """Probability that the higher score is right, as the Bradley-Terry model has it."""
        return 1 / (1 + math.exp(-min(abs(self.lead), 700)))

    @property
    def agreement(self) -> float:
        """Probability that the higher score is right, as the label has it; a tie is half right."""
        if self.lead == 0:
            return 0.5
        return self.chosen_probability if self.lead > 0 else 1 - self.chosen_probability


@dataclass(frozen=True)
class Bucket:
    """Neighbours on an axis."""

    position: float
    """Their mean on the axis."""
    value: float
    """Mean of what is measured."""
    count: int


def calibration(pairs: Sequence[JudgedPair]) -> list[Bucket]:
    """Return how often the higher score is right, by bins of equal width of the confidence."""
    edges = [0.5 + 0.5 * number / NUM_BINS for number in range(1, NUM_BINS)]
    return _buckets([(pair.confidence, pair.agreement) for pair in pairs], edges)


def calibration_error(pairs: Sequence[JudgedPair]) -> float:
    """Return the expected calibration error (ECE): mean |agreement - confidence| of the bins."""
    found = calibration(pairs)
    return sum(b.count * abs(b.value - b.position) for b in found) / len(pairs)


def accuracy_by_margin(pairs: Sequence[JudgedPair]) -> list[Bucket]:
    """Return the accuracy by quartiles of the margin that the data gives."""
    return _quantiles([(pair.margin, float(pair.lead > 0)) for pair in pairs])


def score_by_length(pairs: Sequence[JudgedPair]) -> list[Bucket]:
    """Return the mean score by quartiles of the length of all responses."""
    return _quantiles(
        [
            point
            for pair in pairs
            for point in (
                (float(pair.chosen_tokens), pair.chosen_score),
                (float(pair.rejected_tokens), pair.rejected_score),
            )
        ]
    )


def source_names(paths: Sequence[str]) -> dict[str, str]:
    """Return path -> the name of its file without suffixes, or the path where two have the same."""
    short = {path: Path(path).name.partition(".")[0] for path in paths}
    names = list(short.values())
    return {path: name if names.count(name) == 1 else path for path, name in short.items()}


def _quantiles(points: Sequence[tuple[float, float]]) -> list[Bucket]:
    """Group points by quantiles; those at the same position stay together."""
    positions = sorted(position for position, _ in points)
    cuts = [len(positions) * number // NUM_QUANTILES for number in range(1, NUM_QUANTILES)]
    return _buckets(points, [positions[cut] for cut in cuts] if positions else [])


def _buckets(points: Sequence[tuple[float, float]], edges: Sequence[float]) -> list[Bucket]:
    """Group points by their positions between edges, each in the group that it begins."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        groups.setdefault(bisect_right(edges, point[0]), []).append(point)
    return [
        Bucket(fmean(x for x, _ in group), fmean(y for _, y in group), len(group))
        for _, group in sorted(groups.items())
    ]
