"""The page of a study: two figures, one table, one CSV."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import KL, Arm, Array, Estimate, Row, compare, table

matplotlib.rcParams["svg.hashsalt"] = "marlhf_mega"  # the same bytes for the same numbers
HEAD = (
    "| arm | seeds | gold at the end | mean gold | KL | less the baseline's | p | steps: times "
    "fewer | at equal KL |\n|---|---|---|---|---|---|---|---|---|\n"
)


def write_page(arms: Mapping[str, Arm], baseline: str, folder: Path) -> Path:
    """Write report.md, runs.csv, steps.svg and kl.svg; return the first."""
    rows = list(table(arms))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    _draw(folder / "steps.svg", arms, "step", lambda arm: arm.steps)
    _draw(
        folder / "kl.svg",
        {name: arm for name, arm in arms.items() if KL in arm.curves},
        "KL from the reference (nats per response)",
        lambda arm: arm.curves[KL].mean(0),
    )
    page = folder / "report.md"
    page.write_text(_text(compare(arms, baseline), baseline), encoding="utf-8")
    return page


def _text(rows: Sequence[Row], baseline: str) -> str:
    return (
        "# Study\n\n"
        f"Means over seeds, with 95 % intervals over resampled seeds; the baseline is {baseline}. "
        "p is of a paired t-test. Gold reward is the true one, used only for evaluation.\n\n"
        + HEAD
        + "".join(_row(row) for row in rows)
        + "\n*Steps: times fewer*: steps of the baseline until its final gold reward over those of "
        "the arm until the same; 0 if it never gets there. *At equal KL*: gold reward less the "
        "baseline's where both have half the KL of the baseline's end.\n\n"
        "![Gold reward over steps](steps.svg)\n\n![Gold reward over KL](kl.svg)\n"
    )


def _row(row: Row) -> str:
    cells = [
        row.arm,
        str(len(row.seeds)),
        _shown(row.final),
        _shown(row.area),
        f"{row.kl:.2f}",
        _shown(row.difference, sign="+"),
        "" if row.p_value is None else f"{row.p_value:.3f}",
        _shown(row.speed_up, digits=2),
        _shown(row.at_equal_kl, sign="+"),
    ]
    return f"| {' | '.join(cells)} |\n"


def _shown(found: Estimate | None, *, sign: str = "", digits: int = 4) -> str:
    if found is None:
        return ""
    value, low, high = (f"{x:{sign}.{digits}f}" for x in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def _draw(path: Path, arms: Mapping[str, Arm], label: str, across: Callable[[Arm], Array]) -> None:
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes: Axes = figure.subplots()
    for arm in arms.values():
        x, mean = across(arm), arm.gold.mean(0)
        (line,) = axes.plot(x, mean, label=arm.name)
        error = arm.gold.std(0, ddof=1) / len(arm.seeds) ** 0.5 if len(arm.seeds) > 1 else 0.0
        axes.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.15, lw=0)
    axes.set(xlabel=label, ylabel="gold reward (band: standard error over seeds)")
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
