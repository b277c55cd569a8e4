"""Pictures of macro actions: how long they are, and what they are worth at each position."""

from collections.abc import Mapping, Sequence
from typing import Any

from marlhf_mega.metrics.glossary import Metric
from marlhf_mega.report.charts import Chart, curves, histogram
from marlhf_mega.report.run import Points

POSITIONS = {
    "advantage": Metric(
        "advantage by position",
        about="Mean over responses of the first, second, ... macro action, with a band of one "
        "standard error to either side: where in a response the credit lies.",
    ),
    "value": Metric("value by position", about="What the critic expects before each macro action."),
    "kl": Metric(
        "KL by position",
        "nats",
        about="How far the policy is from the reference in each macro action.",
    ),
}
"""Quantity -> how its chart is called."""


def length_chart(lines: Sequence[Mapping[str, Any]]) -> tuple[int, Chart] | None:
    """Return the last step and the lengths of its actions; None if all have the same length."""
    if not lines or len(lines[-1]["lengths"]) < 2:
        return None
    counts = {int(length): count for length, count in lines[-1]["lengths"].items()}
    return lines[-1]["step"], histogram(counts, unit="macro actions", axis_label="tokens")


def position_charts(lines: Sequence[Mapping[str, Any]]) -> dict[str, Chart]:
    """Return quantity -> its means by position, at the first and at the last step with some.

    There is none of a quantity that does not change, nor of responses that are one action.
    """
    some = [line for line in lines if len(line["positions"]) > 1]
    shown = {f"step {line['step']}": line["positions"] for line in some[:1] + some[-1:]}
    found = {}
    for quantity, metric in POSITIONS.items():
        series = {name: _points(positions, quantity) for name, positions in shown.items()}
        if len({value for points in series.values() for _, value in points}) > 1:
            errors = {
                name: [position.get("advantage_stderr", 0.0) for position in positions]
                for name, positions in shown.items()
            }
            found[quantity] = curves(
                series,
                metric,
                errors=errors if quantity == "advantage" else None,
                axis_label="action",
            )
    return found


def _points(positions: Sequence[Mapping[str, Any]], quantity: str) -> Points:
    return [
        (float(k), position[quantity])
        for k, position in enumerate(positions, start=1)
        if quantity in position
    ]
