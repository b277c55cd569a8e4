"""What the page shows of a reward model's held-out pairs: a chart and two tables."""

from collections.abc import Sequence

from marlhf_mega.metrics.format import number
from marlhf_mega.metrics.glossary import Metric
from marlhf_mega.metrics.pairs import (
    Bucket,
    JudgedPair,
    accuracy_by_margin,
    calibration,
    score_by_length,
)
from marlhf_mega.report.charts import Chart, curves

CALIBRATION = Metric(
    "calibration",
    "%",
    about="How often the higher score is right, by the confidence that the scores stand for; a "
    "calibrated model follows the diagonal.",
)
_ACCURACY = Metric("accuracy", "%")
_SCORE = Metric("mean score")


def calibration_chart(pairs: Sequence[JudgedPair]) -> Chart | None:
    """Return how often the model is right by its confidence, beside how often it should be."""
    found = calibration(pairs)
    if len(found) < 2:
        return None
    series = {
        "right": [(100 * bucket.position, bucket.value) for bucket in found],
        "confidence": [(100 * bucket.position, bucket.position) for bucket in found],
    }
    return curves(series, CALIBRATION, axis_label="conf. %")


def pair_tables(pairs: Sequence[JudgedPair]) -> list[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Return (headings, rows) of tables; none of what all pairs have in common."""
    tables = [
        _table("margin of the data", _ACCURACY, "pairs", accuracy_by_margin(pairs)),
        _table("tokens", _SCORE, "responses", score_by_length(pairs)),
    ]
    return [table for table in tables if len(table[1]) > 1]


def _table(
    axis: str, metric: Metric, unit: str, buckets: Sequence[Bucket]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = [(number(b.position), metric.bare(b.value), f"{b.count:,}") for b in buckets]
    return (axis, metric.title, unit), list(rows)
