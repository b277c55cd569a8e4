"""The page of a study: tables, figures and a CSV."""

import csv
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path

import matplotlib
from frontier import Frontier, frontiers
from grid import Grid
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import (
    EXPLAINED,
    KL,
    SCORE,
    SPREAD,
    Arm,
    Array,
    Estimate,
    Row,
    compare,
    table,
)

matplotlib.rcParams["svg.hashsalt"] = "marlhf_mega"  # the same bytes for the same numbers
matplotlib.rcParams["svg.fonttype"] = "none"  # words, not outlines of letters
HEAD = (
    "| arm | seeds | gold at the end | mean gold | KL | less the baseline's | p | steps: times "
    "fewer | by score | at equal KL |\n|---|---|---|---|---|---|---|---|---|---|\n"
)
MORE = (
    "| arm | score at the end | explained variance | spread of advantages | seconds a step |\n"
    "|---|---|---|---|---|\n"
)


def write_page(arms: Mapping[str, Arm], grid: Grid, folder: Path) -> Path:
    """Write report.md, runs.csv, steps.svg, seconds.svg, kl.svg; return the first.

    Also frontier.svg, if arms of the grid's frontiers are there.
    """
    rows = list(table(arms))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    drawn = grid.drawn or tuple(arms)
    curves = {n: arm for n, arm in arms.items() if n in drawn and not arm.has_own_jobs}
    _draw(folder / "steps.svg", curves, "step", lambda arm: arm.steps)
    _draw(folder / "seconds.svg", curves, "seconds of training", lambda arm: arm.seconds.mean(0))
    _draw(
        folder / "kl.svg",
        {name: arm for name, arm in curves.items() if KL in arm.curves},
        "KL from the reference (nats per response)",
        lambda arm: arm.curves[KL].mean(0),
    )
    text = _text(arms, compare(arms, grid.baseline), grid.baseline)
    if found := frontiers(arms, grid.frontiers):
        _draw_frontiers(folder / "frontier.svg", found)
        text += _frontiers_text(found)
    page = folder / "report.md"
    page.write_text(text, encoding="utf-8")
    return page


def _text(arms: Mapping[str, Arm], rows: Sequence[Row], baseline: str) -> str:
    return (
        "# Study\n\n"
        f"Means over seeds, with 95 % intervals over resampled seeds; the baseline is {baseline}. "
        "p is of a paired t-test. Gold reward is what evaluate.gold says.\n\n"
        + HEAD
        + "".join(_row(row) for row in rows)
        + "\n*Steps: times fewer*: steps of the baseline until its final gold reward over those of "
        "the arm until the same (0 where a resample never gets there); *by score*: the same of the "
        "score that is trained on. *At equal KL*: gold reward less the baseline's where both have "
        "half the KL of the baseline's end.\n\n"
        + MORE
        + "".join(_more(arm) for arm in arms.values())
        + "\nMeans over seeds; of critic and advantages also over the second half of the run.\n\n"
        "![Gold reward over steps](steps.svg)\n\n![Gold reward over seconds](seconds.svg)\n\n"
        "![Gold reward over KL](kl.svg)\n"
    )


def _frontiers_text(found: Sequence[Frontier]) -> str:
    return (
        "\n## At equal KL\n\n"
        "| arms | KL at the end | gold at the end | less the first's at equal KL |\n"
        "|---|---|---|---|\n"
        + "".join(
            f"| {one.name} | {_list(one.kl, 2)} | {_list(one.gold, 3)} "
            f"| {_shown(one.lead, sign='+')} |\n"
            for one in found
        )
        + "\nThe ends of arms that differ in the weight of the KL; the difference is the mean over "
        "the KL that both reach, straight between the ends.\n\n"
        + _speed_ups_text(found)
        + "![Frontiers of gold reward over KL](frontier.svg)\n"
    )


def _speed_ups_text(found: Sequence[Frontier]) -> str:
    rows = [
        f"| {one.name} | {arm} | {_times(speed_up)} |\n"
        for one in found
        for arm, speed_up in one.speed_ups.items()
    ]
    if not rows:
        return ""
    return (
        "| arms | at the KL of | steps: times fewer |\n|---|---|---|\n"
        + "".join(rows)
        + "\nSteps of that arm until its final gold reward, over those until the same at its final "
        "KL, mixed from the two curves that end below and above it; empty beyond them.\n\n"
    )


def _list(values: Array, digits: int) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def _row(row: Row) -> str:
    cells = [
        row.arm,
        str(len(row.seeds)),
        _shown(row.final),
        _shown(row.area),
        "" if isnan(row.kl) else f"{row.kl:.2f}",
        _shown(row.difference, sign="+"),
        _p_value(row.p_value),
        _times(row.speed_up),
        _times(row.score_speed_up),
        _shown(row.at_equal_kl, sign="+"),
    ]
    return f"| {' | '.join(cells)} |\n"


def _more(arm: Arm) -> str:
    score, explained, spread = (arm.curves.get(name) for name in (SCORE, EXPLAINED, SPREAD))
    second_half = slice(len(arm.steps) // 2, None)
    cells = [
        arm.name,
        "" if score is None else f"{score[:, -1].mean():.2f}",
        "" if explained is None else f"{explained[:, second_half].mean():.2f}",
        "" if spread is None else f"{spread[:, second_half].mean():.3f}",
        "" if arm.has_own_jobs else f"{arm.seconds[:, -1].mean() / arm.steps[-1]:.2f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def _p_value(found: float | None) -> str:
    if found is None:
        return ""
    return f"{found:.3f}" if found >= 0.001 else "< 0.001"


def _times(found: Estimate | None) -> str:
    return "never" if found is not None and found.value == 0 else _shown(found, digits=2)


def _shown(found: Estimate | None, *, sign: str = "", digits: int = 4) -> str:
    if found is None or isnan(found.value):
        return ""
    value, low, high = (f"{x:{sign}.{digits}f}" for x in (found.value, found.low, found.high))
    return value if found.low == found.high else f"{value} [{low}, {high}]"  # of one seed


def _draw_frontiers(path: Path, found: Sequence[Frontier]) -> None:
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes: Axes = figure.subplots()
    for one in found:
        axes.plot(one.kl, one.gold, marker="o", label=one.name)
    axes.set(xlabel="KL from the reference at the end (nats per response)", ylabel="gold reward")
    axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


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
