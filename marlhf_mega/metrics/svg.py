"""Small charts as inline SVG. Colours are classes, so that the page's style sheet owns them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from marlhf_mega.metrics.progress import number

Points = Sequence[tuple[float, float]]
"""(step, value), steps ascending, values finite."""

LEFT, RIGHT, TOP, BOTTOM = 46, 6, 8, 20
MAX_POINTS = 160
NUM_COLOURS = 8


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The drawing area and what its edges stand for."""

    first: float
    last: float
    low: float
    high: float
    width: int = 300
    height: int = 165

    @property
    def inner_width(self) -> int:
        return self.width - LEFT - RIGHT

    @property
    def floor(self) -> int:
        return self.height - BOTTOM

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * self.inner_width

    def y(self, value: float) -> float:
        return self.floor - (value - self.low) / (self.high - self.low) * (self.floor - TOP)

    def svg(self, parts: Sequence[str], label: str) -> str:
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img"'
            f' aria-label="{escape(label)}">{self._axes()}{"".join(parts)}</svg>'
        )

    def _axes(self) -> str:
        lines = []
        for value in ticks(self.low, self.high, 5):
            y = self.y(value)
            lines.append(
                f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}"'
                f' y2="{y:.1f}"/><text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}"'
                f' text-anchor="end">{number(value)}</text>'
            )
        for value in ticks(self.first, self.last, self.width // 50):
            if value == round(value):
                lines.append(
                    f'<text class="tick" x="{self.x(value):.1f}" y="{self.height - 5}"'
                    f' text-anchor="middle">{number(value)}</text>'
                )
        lines.append(f'<path class="axis" d="M{LEFT} {TOP}V{self.floor}H{self.width - RIGHT}"/>')
        return "".join(lines)


def line_chart(points: Points, *, label: str) -> str:
    """Draw one metric over steps; hovering shows step and value."""
    steps = [round(step) for step in _thin([step for step, _ in points])]
    values = _thin([value for _, value in points])
    low, high = _padded(values)
    frame = _Frame(first=steps[0], last=max(steps[-1], steps[0] + 1), low=low, high=high)
    xs, ys = [frame.x(step) for step in steps], [frame.y(value) for value in values]
    noisy = len(points) > 30
    parts = [_path(xs, ys, "raw"), _path(xs, _smooth(ys), "line")] if noisy else []
    parts = parts or [_path(xs, ys, "line")]
    always = " dots" if len(points) <= 12 else ""
    half = frame.inner_width / max(len(steps), 2) / 2
    for step, value, x, y in zip(steps, values, xs, ys, strict=True):
        parts.append(
            f'<g class="point{always}"><title>step {number(step)}: {number(value)}</title>'
            f'<rect x="{x - half:.1f}" y="{TOP}" width="{2 * half:.1f}"'
            f' height="{frame.floor - TOP}"/><circle cx="{x:.1f}" cy="{y:.1f}" r="3"/></g>'
        )
    return frame.svg(parts, label)


def stacked_chart(series: Mapping[str, Sequence[float]], steps: Sequence[float]) -> str:
    """Draw seconds per phase as one stacked bar per step.

    Args:
        series: phase -> one value per step; all of the same length.
        steps: the step of each bar.
    """
    bars = {name: _thin(values) for name, values in series.items()}
    at = [round(step) for step in _thin(steps)]
    totals = [sum(column) for column in zip(*bars.values(), strict=True)]
    high = max(totals) * 1.05 or 1.0
    frame = _Frame(first=at[0], last=max(at[-1], at[0] + 1), low=0.0, high=high, width=580)
    slot = frame.inner_width / len(at)
    parts = []
    heights = [0.0] * len(at)
    for colour, (name, values) in enumerate(bars.items()):
        for index, value in enumerate(values):
            bottom, top = frame.y(heights[index]), frame.y(heights[index] + value)
            heights[index] += value
            parts.append(
                f'<rect class="fill{colour % NUM_COLOURS}" x="{LEFT + index * slot:.2f}"'
                f' y="{top:.2f}" width="{max(slot - 0.6, 0.4):.2f}" height="{bottom - top:.2f}">'
                f"<title>step {number(at[index])}: {escape(name)} {number(value)} s"
                f" of {number(totals[index])} s</title></rect>"
            )
    return frame.svg(parts, "seconds per phase")


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) inside [low, high]."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def _path(xs: Sequence[float], ys: Sequence[float], kind: str) -> str:
    joined = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))
    return f'<path class="{kind}" d="M{joined}"/>'


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.06
    if margin <= abs(high) * 1e-9:
        margin = abs(high) * 0.1 or 1.0
    return low - margin, high + margin


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
