"""Geometry of the charts: `templates/charts.html` draws them, the style sheet has the colours."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar, Literal

from marlhf_mega.metrics.format import axis_labels, number
from marlhf_mega.metrics.glossary import Metric
from marlhf_mega.report.run import Points

MAX_POINTS = 100
NOISY = 30
"""A curve of more points is drawn faintly, with its running mean over it."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The drawing area, and what its edges stand for."""

    first: float
    last: float
    marks: Sequence[float]
    """Values marked on the vertical axis; the outermost are its ends."""
    width: int
    height: int = 150
    label: str = "step"
    """What the horizontal axis counts."""

    left: ClassVar[int] = 42
    top: ClassVar[int] = 8

    @property
    def right(self) -> int:
        """The right edge."""
        return self.width - 8

    @property
    def floor(self) -> int:
        """The lower edge."""
        return self.height - 20

    @property
    def rows(self) -> list[tuple[float, str]]:
        """(y, label) of the horizontal lines."""
        return [
            (self.y(v), text) for v, text in zip(self.marks, axis_labels(self.marks), strict=True)
        ]

    @property
    def columns(self) -> list[tuple[float, str]]:
        """(x, label) of some steps."""
        return [(self.x(s), number(s)) for s in step_marks(self.first, self.last, self.width // 50)]

    def x(self, step: float) -> float:
        """Return where a step is."""
        share = (step - self.first) / (self.last - self.first)
        return round(self.left + share * (self.right - self.left), 1)

    def y(self, value: float) -> float:
        """Return where a value is."""
        share = (value - self.marks[0]) / (self.marks[-1] - self.marks[0])
        return round(self.floor - share * (self.floor - self.top), 1)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What is said about one place on the horizontal axis, and a dot on each curve there."""

    x: float
    text: str
    dots: Sequence[tuple[float, int]]
    """(y, series)."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A stroke, or the filled area of a band."""

    style: Literal["line", "raw", "band"]
    series: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar, or a part of a stacked one."""

    x: float
    y: float
    height: float
    series: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves or bars in a frame."""

    frame: Frame
    slot: float
    """Width that a bar has, or around a point in which its text is shown."""
    points: Sequence[Point] = ()
    lines: Sequence[Line] = ()
    bars: Sequence[Bar] = ()
    names: Sequence[tuple[int, str]] = ()
    """(series, name) of the legend; nothing for a single one."""


def curve(points: Points, metric: Metric, errors: Sequence[float] = ()) -> Chart:
    """Draw one metric over its steps, with its standard errors if there are any."""
    return curves({"": points}, metric, errors={"": errors} if errors else None)


def curves(
    series: Mapping[str, Points],
    metric: Metric,
    *,
    order: Sequence[str] = (),
    errors: Mapping[str, Sequence[float]] | None = None,
    axis_label: str = "step",
) -> Chart:
    """Draw one metric of several runs, or of several moments of one, over the same axis.

    Args:
        series: name -> its points; a long one is drawn as means of neighbours.
        metric: what it is.
        order: names whose position gives the colour; none: those of `series`.
        errors: name -> the standard error of each point, drawn as a band to either side.
        axis_label: what the horizontal axis counts.
    """
    shown = {name: _scaled(points, metric.scale) for name, points in series.items()}
    spread = {
        name: _thin([error * metric.scale for error in values])
        for name, values in (errors or {}).items()
    }
    edges = [value for points in shown.values() for _, value in points]
    for name, values in spread.items():
        pairs = list(zip(shown[name], values, strict=True))
        edges += [v + e for (_, v), e in pairs] + [v - e for (_, v), e in pairs]
    steps = sorted({step for points in shown.values() for step, _ in points})
    frame = Frame(
        first=steps[0],
        last=max(steps[-1], steps[0] + 1),
        marks=axis(min(edges), max(edges), from_zero=metric.is_amount),
        width=300,
        label=axis_label,
    )
    places = list(order or series)
    index = {name: places.index(name) for name in series}
    lines = [
        Line(style="band", series=index[name], path=_band(frame, shown[name], values))
        for name, values in spread.items()
    ]
    for name, points in shown.items():
        lines += _strokes(frame, points, index[name], is_noisy=len(series[name]) > NOISY)
    values_at = {name: dict(points) for name, points in shown.items()}
    return Chart(
        frame=frame,
        lines=lines,
        points=[_point(frame, step, values_at, metric, index) for step in steps],
        slot=round((frame.right - frame.left) / max(len(steps), 2), 1),
        names=[(index[name], name) for name in series] if len(series) > 1 else (),
    )


def _scaled(points: Points, scale: float) -> list[tuple[float, float]]:
    """Thin a curve out and bring it to the shown unit."""
    steps = [round(step) for step in _thin([step for step, _ in points])]
    return list(zip(steps, _thin([value * scale for _, value in points]), strict=True))


def _strokes(frame: Frame, points: Points, series: int, *, is_noisy: bool) -> list[Line]:
    """Return a curve, and of a noisy one its running mean over it."""
    xs, ys = [frame.x(step) for step, _ in points], [frame.y(value) for _, value in points]
    if not is_noisy:
        return [Line(style="line", series=series, path=_path(xs, ys))]
    return [
        Line(style="raw", series=series, path=_path(xs, ys)),
        Line(style="line", series=series, path=_path(xs, _smooth(ys))),
    ]


def _band(frame: Frame, points: Points, errors: Sequence[float]) -> str:
    above = [(step, value + error) for (step, value), error in zip(points, errors, strict=True)]
    below = [(step, value - error) for (step, value), error in zip(points, errors, strict=True)]
    outline = above + below[::-1]
    return _path([frame.x(s) for s, _ in outline], [frame.y(v) for _, v in outline]) + "Z"


def _point(
    frame: Frame,
    step: float,
    values_at: Mapping[str, Mapping[float, float]],
    metric: Metric,
    index: Mapping[str, int],
) -> Point:
    values = {name: at[step] for name, at in values_at.items() if step in at}
    said = [f"{name} {number(value)} {metric.unit}".strip() for name, value in values.items()]
    return Point(
        x=frame.x(step),
        text=f"{frame.label} {number(step)}: {', '.join(said)}",
        dots=[(frame.y(value), index[name]) for name, value in values.items()],
    )


def histogram(counts: Mapping[int, int], *, unit: str, axis_label: str) -> Chart:
    """Draw how often each whole number occurs, as a share of all.

    Args:
        counts: number -> how often.
        unit: what occurs, in the plural.
        axis_label: what the numbers are.
    """
    total = sum(counts.values())
    shares = {value: 100 * count / total for value, count in counts.items()}
    frame = Frame(
        first=min(counts) - 0.5,
        last=max(counts) + 0.5,
        marks=axis(0.0, max(shares.values()), from_zero=True),
        width=300,
        label=axis_label,
    )
    slot = (frame.right - frame.left) / (max(counts) - min(counts) + 1)
    bars = [
        Bar(
            x=round(frame.x(value) - slot * 0.43, 1),
            y=frame.y(share),
            height=round(frame.floor - frame.y(share), 1),
            series=0,
            text=f"{value} {axis_label}: {counts[value]:,} {unit}, {share:.1f} %",
        )
        for value, share in shares.items()
    ]
    return Chart(frame=frame, bars=bars, slot=round(slot * 0.86, 1))


def stack(series: Mapping[str, Sequence[float]], steps: Sequence[float]) -> Chart:
    """Draw seconds per phase as one stacked bar per step.

    Args:
        series: phase -> one value per step; all of the same length.
        steps: the step of each bar.
    """
    phases = {name: _thin(values) for name, values in series.items()}
    at = [round(step) for step in _thin(steps)]
    totals = [sum(column) for column in zip(*phases.values(), strict=True)]
    half = (at[-1] - at[0]) / max(len(at) - 1, 1) / 2 or 0.5
    marks = axis(0.0, max(totals), from_zero=True)
    frame = Frame(first=at[0] - half, last=at[-1] + half, marks=marks, width=640, height=190)
    slot = (frame.right - frame.left) / len(at)
    bars = [
        bar
        for index, step in enumerate(at)
        for bar in _parts(frame, step, {name: v[index] for name, v in phases.items()}, slot)
    ]
    return Chart(frame=frame, bars=bars, slot=round(slot * 0.9, 1))


def _parts(frame: Frame, step: int, seconds: Mapping[str, float], slot: float) -> Iterator[Bar]:
    total, reached = sum(seconds.values()), 0.0
    for series, (name, value) in enumerate(seconds.items()):
        floor, top = frame.y(reached), frame.y(reached + value)
        reached += value
        yield Bar(
            x=round(frame.x(step) - slot * 0.45, 1),
            y=top,
            height=round(floor - top, 1),
            series=series,
            text=f"step {number(step)}: {name} {number(value)} s of {number(total)} s",
        )


def axis(low: float, high: float, *, from_zero: bool) -> list[float]:
    """Return round numbers at equal distances, the first and last of which enclose the values.

    It begins at zero if it has to, or if the values come near.
    """
    if low >= 0 and (from_zero or low < high / 2):
        low = 0.0
    if high - low <= abs(high) * 1e-9:
        high += abs(high) * 0.1 or 1.0
    step = _round_step((high - low) / 6)
    return _multiples(step, math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9))


def step_marks(first: float, last: float, wanted: int) -> list[float]:
    """Return round steps inside of [first, last]."""
    step = max(_round_step((last - first) / wanted), 1.0)
    return _multiples(step, math.ceil(first / step), math.floor(last / step))


def _round_step(rough: float) -> float:
    """Return the next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)


def _multiples(step: float, first: int, last: int) -> list[float]:
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def _path(xs: Sequence[float], ys: Sequence[float]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))


def _thin(values: Sequence[float]) -> list[float]:
    """Shorten a curve to at most MAX_POINTS means of neighbours."""
    size = -(-len(values) // MAX_POINTS)
    return [fmean(values[start : start + size]) for start in range(0, len(values), size)]


def _smooth(values: Sequence[float]) -> list[float]:
    """Average each value with its neighbours, a twentieth of the curve on either side."""
    reach = max(len(values) // 20, 1)
    return [
        fmean(values[max(index - reach, 0) : index + reach + 1]) for index in range(len(values))
    ]
