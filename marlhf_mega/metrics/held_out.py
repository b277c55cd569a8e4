"""Held-out results: means over samples, their standard errors, and the change since the start."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from marlhf_mega.metrics.glossary import WIN_RATES, change_name, other_name, stderr_name

T = TypeVar("T")
_NOTHING: Any = object()

SCORE = "eval/score_mean"
GOLD = "eval/gold_mean"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What a model makes of each held-out sample, in the order of the file."""

    values: Mapping[str, Sequence[float]]
    """Metric -> a value per sample; NaN where a sample has none."""
    weights: Sequence[float] | None = None
    """Weights of the samples in all means, such as their tokens. None means equal ones."""
    exponentials: Mapping[str, str] = field(default_factory=dict)
    """Metric -> that of whose mean it is the exponential: perplexity -> loss."""
    statistics: Mapping[str, float] = field(default_factory=dict)
    """Metric -> its value, where that is of all samples together and has no standard error. NaN
    where there is none."""
    contest: str | None = None
    """Metric in which samples win or lose against those of the start. None means no win rate."""

    @property
    def metrics(self) -> dict[str, float]:
        """The means, with `_stderr` beside them where two samples or more have a value."""
        found = {n: value for n, value in self.statistics.items() if not math.isnan(value)}
        for name in (*self.values, *self.exponentials):
            valid = self._valid(name)
            found |= _shown(name, self._estimate(name, valid))
        return found

    def since(self, first: "HeldOut") -> dict[str, float]:
        """Return the changes since earlier results on the same samples, and the win rate.

        The samples are paired, so that what makes some harder than others drops out of the
        standard errors. Those that have a value in only one of the two do not count, and a file
        that is longer in one of them is paired as far as both go.
        """
        found = self._changes(first)
        if self.contest is not None and self.contest == first.contest:
            wins = _wins(self.values[self.contest], first.values[self.contest])
            found |= HeldOut(values={"eval/win_rate": wins}).metrics
        return found

    def _changes(self, first: "HeldOut") -> dict[str, float]:
        found: dict[str, float] = {}
        for name in (*self.values, *self.exponentials):
            if name in first.values or name in first.exponentials:
                size = min(len(self._column(name)), len(first._column(name)))
                valid = self._valid(name)[:size] & first._valid(name)[:size]
                now, then = self._estimate(name, valid), first._estimate(name, valid)
                difference = _Estimate(now.value - then.value, now.influence - then.influence)
                found |= _shown(change_name(name), difference)
        return found

    def against(self, other: "HeldOut") -> dict[str, float]:
        """Compare with what another policy makes of the same samples.

        Returns:
            The other's results as `other/*`, the paired differences as `eval/*_change`, and of
            every judge the win rate, its 95 % interval and the share of ties.
        """
        found = {other_name(name): value for name, value in other.metrics.items()}
        found |= self._changes(other)
        for judge, win_rate in WIN_RATES.items():
            if judge in self.values and (wins := _wins(self.values[judge], other.values[judge])):
                low, high = score_interval(wins)
                found |= HeldOut(values={win_rate: wins}).metrics
                found |= {f"{win_rate}_low": low, f"{win_rate}_high": high}
                found[f"{win_rate}_ties"] = wins.count(0.5) / len(wins)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Self:
        """Return what was kept."""
        return cls(**state)

    def _column(self, name: str) -> Tensor:
        return _vector(self.values[self.exponentials.get(name, name)])

    def _valid(self, name: str) -> Tensor:
        return ~self._column(name).isnan()

    def _estimate(self, name: str, valid: Tensor) -> "_Estimate":
        values = self._column(name)[: len(valid)][valid]
        weights = torch.ones_like(values)
        if self.weights is not None:
            weights = _vector(self.weights)[: len(valid)][valid]
        mean = (weights * values).sum() / weights.sum()
        influence = weights * (values - mean) * len(values) / weights.sum()
        if name in self.exponentials:
            mean = mean.exp()
            influence = influence * mean
        return _Estimate(mean.item(), influence)


class SinceStart:
    """Compares held-out results with the first ones of the run, which checkpoints keep."""

    def __init__(self, data_hash: str = "") -> None:
        """Begin a run that is judged on the held-out data with this hash."""
        self._data_hash = data_hash
        self._first: HeldOut | None = None
        self._is_known = True

    def metrics(self, now: HeldOut) -> dict[str, float]:
        """Return the results and, from the second time on, what has changed since the first."""
        if self._first is not None:
            return now.metrics | now.since(self._first)
        if self._is_known:
            self._first = now
        return now.metrics

    def state(self) -> dict[str, Any] | None:
        """Return what a checkpoint keeps."""
        first = self._first
        return None if first is None else first.to_json() | {"data_hash": self._data_hash}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Continue a run; without a state its start was not evaluated, or is not known.

        Nor is it known on other held-out data than that of the start.
        """
        results = dict(state or {})
        is_same = results.pop("data_hash", self._data_hash) == self._data_hash
        self._first = HeldOut.from_json(results) if results and is_same else None
        self._is_known = self._first is not None


def interleave(parts: Sequence[Sequence[T]]) -> list[T]:
    """Return what replicas found in the order of the file; replica r has lines r, r + n, ..."""
    rows = itertools.zip_longest(*parts, fillvalue=_NOTHING)
    return [item for row in rows for item in row if item is not _NOTHING]


def means_of_groups(values: Sequence[float], size: int) -> list[float]:
    """Return the means of groups of neighbours; NaN counts nowhere, and is the mean of only NaN."""
    groups = _vector(values).view(-1, size)
    means: list[float] = groups.nanmean(1).tolist()
    return means


def best_of_groups(values: Sequence[float], scores: Sequence[float], size: int) -> list[float]:
    """Return of each group of neighbours the value of the one with the highest score.

    The first of equals; one without a score (NaN) only where none has any.
    """
    ranked = _vector(scores).nan_to_num(nan=-math.inf).view(-1, size)
    best = ranked.argmax(1, keepdim=True)
    found: list[float] = _vector(values).view(-1, size).gather(1, best).flatten().tolist()
    return found


@dataclass(frozen=True)
class _Estimate:
    """A statistic, and by how much each sample moves it.

    Its variance is that of the influences over their number (delta method); for a mean they are
    the deviations from it.
    """

    value: float
    influence: Tensor
    """[samples] with mean 0."""

    @property
    def error(self) -> float | None:
        size = len(self.influence)
        if size < 2:
            return None
        return math.sqrt(self.influence.square().sum().item() / (size * (size - 1)))


def score_interval(wins: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % score interval (Wilson 1927) of a win rate over paired samples with ties.

    It holds every rate p for which the mean m of the wins is within 1.96 standard errors,
    (m - p)^2 <= 1.96^2 (p (1 - p) - ties / 4) / n, where p (1 - p) - ties / 4 is the variance of a
    sample that is tied, and so half a win, with the observed share. Unlike m +- 1.96 standard
    errors it stays within [0, 1] and is no point where one policy wins everywhere.

    Args:
        wins: 1 for a win, 0.5 for a tie, 0 for a loss; at least one.
    """
    share = 1.959964**2 / len(wins)
    mean, ties = sum(wins) / len(wins), wins.count(0.5) / len(wins)
    middle = mean + share / 2
    square = middle**2 - (1 + share) * (mean**2 + share * ties / 4)
    reach = math.sqrt(max(square, 0.0))
    return (middle - reach) / (1 + share), (middle + reach) / (1 + share)


def _wins(scores: Sequence[float], others: Sequence[float]) -> list[float]:
    """Return 1 where a score is above the other, 0.5 where they are equal, and 0 below."""
    return [
        float(now > then) + 0.5 * (now == then)
        for now, then in zip(scores, others, strict=False)
        if not (math.isnan(now) or math.isnan(then))
    ]


def _shown(name: str, estimate: _Estimate) -> dict[str, float]:
    if not len(estimate.influence):
        return {}
    error = estimate.error
    return {name: estimate.value} | ({} if error is None else {stderr_name(name): error})


def _vector(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
