"""Metrics declared by kind, summed over microbatches, reduced over ranks once per step."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Takes this rank's vector and returns the combined one; in place or not."""


class MetricSums:
    """One rank's share of the metrics of a step.

    The names are declared up front, so that every rank packs the same vector, also a rank that
    had nothing to add. Values stay on their device: adding never waits for it. A rank that adds
    nothing changes nothing, so the ranks that hold copies of a result must not all add it.
    """

    def __init__(
        self,
        *,
        mean: Sequence[str] = (),
        moments: Sequence[str] = (),
        total: Sequence[str] = (),
        maximum: Sequence[str] = (),
    ) -> None:
        """Declare names: `mean` is sum / count, the others combine the values themselves.

        `moments` become `NAME_mean` and `NAME_variance`.
        """
        self._moments = tuple(moments)
        means = [*mean, *(f"{m}_{what}" for m in moments for what in ("mean", "square"))]
        self._sums: dict[str, Tensor] = {name: _scalar(0.0) for name in sorted([*means, *total])}
        self._counts: dict[str, Tensor] = {name: _scalar(0.0) for name in sorted(means)}
        self._maxima = {name: _scalar(-torch.inf) for name in sorted(maximum)}
        declared = [*means, *total, *maximum]
        assert len(declared) == len(set(declared)), f"declared twice: {sorted(declared)}"

    def add_means(self, sums: Mapping[str, Tensor | float], *, count: Tensor | float) -> None:
        """Add sums over the same `count` items (tokens, sequences, ...) to several means."""
        for name, value in sums.items():
            self._sums[name] = self._sums[name] + _scalar(value)
            self._counts[name] = self._counts[name] + _scalar(count)

    def add_mean(self, name: str, value: Tensor) -> None:
        """Add every element of `value`, of any shape, to a mean."""
        self.add_means({name: value.detach().double().sum()}, count=value.numel())

    def add_moments(
        self, name: str, values: Tensor, *, count: Tensor | float | None = None
    ) -> None:
        """Add values to a mean and a variance.

        Args:
            name: of the moments.
            values: any shape; zeros where only some count.
            count: how many count; None means all.
        """
        wide = values.detach().double()
        self.add_means(
            {f"{name}_mean": wide.sum(), f"{name}_square": wide.square().sum()},
            count=values.numel() if count is None else count,
        )

    def add_total(self, name: str, value: Tensor | float) -> None:
        """Add a value to a sum."""
        assert name not in self._counts, f"{name} is a mean"
        self._sums[name] = self._sums[name] + _scalar(value)

    def add_maximum(self, name: str, value: Tensor | float) -> None:
        """Offer a value to a maximum."""
        offered = _scalar(value)
        self._maxima[name] = torch.maximum(self._maxima[name].to(offered.device), offered)

    def pack(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return one float64 vector to all-reduce by sum and one by maximum."""
        added = [*self._sums.values(), *self._counts.values()]
        return _vector(added, device), _vector(list(self._maxima.values()), device)

    def unpack(self, added: Tensor, maxima: Tensor) -> dict[str, float]:
        """Turn the reduced vectors into values; what no rank has added to is left out."""
        numbers, highest = added.tolist(), maxima.tolist()
        sums = dict(zip(self._sums, numbers, strict=False))
        counts = dict(zip(self._counts, numbers[len(sums) :], strict=True))
        values = {
            name: value / counts.get(name, 1.0)
            for name, value in sums.items()
            if counts.get(name, 1.0)
        }
        for name in self._moments:
            if (square := values.pop(f"{name}_square", None)) is not None:
                values[f"{name}_variance"] = max(square - values[f"{name}_mean"] ** 2, 0.0)
        for name, value in zip(self._maxima, highest, strict=True):
            if value != -torch.inf:
                values[name] = value
        return dict(sorted(values.items()))


def reduce_metrics(
    sums: MetricSums,
    all_reduce_sum: AllReduce,
    all_reduce_max: AllReduce,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Combine the ranks' metrics with one collective per kind; every rank gets the values.

    Args:
        sums: this rank's share; the declared names are the same on every rank.
        all_reduce_sum: adds a vector over all ranks that call.
        all_reduce_max: takes the largest per element over the same ranks.
        device: where the collectives work.
    """
    added, maxima = sums.pack(device)
    return sums.unpack(all_reduce_sum(added), all_reduce_max(maxima))


def _scalar(value: Tensor | float) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64)
    return torch.tensor(value, dtype=torch.float64)


def _vector(scalars: list[Tensor], device: torch.device | str) -> Tensor:
    if not scalars:
        return torch.zeros(0, dtype=torch.float64, device=device)
    return torch.stack([scalar.to(device) for scalar in scalars])
