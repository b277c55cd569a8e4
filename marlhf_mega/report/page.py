"""`report.html`: one self-contained file with results, curves, timings and samples of runs."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from marlhf_mega.metrics.format import number
from marlhf_mega.metrics.glossary import is_beside, lookup, order
from marlhf_mega.metrics.progress import TERMINAL_METRICS
from marlhf_mega.report import charts
from marlhf_mega.report.compare import comparisons
from marlhf_mega.report.facts import stage_facts
from marlhf_mega.report.macro_actions import POSITIONS, length_chart, position_charts
from marlhf_mega.report.pairs import CALIBRATION, calibration_chart, pair_tables
from marlhf_mega.report.run import Points, Result, Stage, read_stage, results
from marlhf_mega.report.samples import Scales, first_and_last, rest, signed, spans, strips
from marlhf_mega.report.times import StepTimes, is_in_step_times, step_times

GROUPS = {
    "eval": "held-out",
    "rollout": "rollout",
    "policy": "policy",
    "critic": "critic",
    "macro": "macro actions",
    "sft": "SFT",
    "reward": "reward model",
    "preference": "preferences",
    "offline": "offline",
    "time": "time",
    "perf": "speed and memory",
}
"""First part of a metric's name -> heading, in this order; other groups follow."""

MAX_MAIN_CURVES = 4
"""Above all others: those that the terminal shows."""


@dataclass(frozen=True)
class CurveGroup:
    """Metrics under one heading: curves of those that change, numbers of those that do not."""

    heading: str
    curves: Mapping[str, Points]
    constants: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """What the page shows of one run."""

    anchor: str
    name: str
    stage: Stage
    facts: Sequence[tuple[str, str]]
    results: Sequence[Result]
    main: Mapping[str, Points]
    times: StepTimes | None
    groups: Sequence[CurveGroup]


def report(run_dirs: Sequence[Path], out: Path) -> None:
    """Write one page about one or more runs; the last one comes first, then those before it.

    Runs of the same job are compared above all others.

    Args:
        run_dirs: run directories, such as those of sft, reward and ppo.
        out: the HTML file.

    Raises:
        ValueError: a directory holds no metrics.jsonl, or a line of a file is damaged.
    """
    stages = [read_stage(path) for path in run_dirs]
    names = _names(stages, run_dirs)
    sections = [
        _section(stage, name, f"stage{number}")
        for number, (stage, name) in enumerate(zip(stages, names, strict=True))
    ]
    page = (
        _environment()
        .get_template("page.html")
        .render(sections=sections, comparisons=comparisons(stages, names))
    )
    # Lone surrogates from a tokenizer cannot be encoded; control characters are not HTML.
    page = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", page)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="replace")


def _names(stages: Sequence[Stage], run_dirs: Sequence[Path]) -> list[str]:
    """Return the runs' names, or what tells their directories apart if two have the same."""
    names = [stage.name for stage in stages]
    if len(set(names)) == len(names):
        return names
    folders = [path.resolve() for path in run_dirs]
    shared = Path(os.path.commonpath(folders))
    names = [str(path.relative_to(shared)) for path in folders]
    # The same directory may be given twice.
    return [f"{name} ({n})" if names.count(name) > 1 else name for n, name in enumerate(names, 1)]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("marlhf_mega.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = (
        *(charts.curve, charts.curves, charts.stack, first_and_last, spans, strips, rest),
        *(length_chart, position_charts, lookup, number, signed),
        *(calibration_chart, pair_tables),
    )
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {
        "CALIBRATION": CALIBRATION,
        "POSITIONS": POSITIONS,
        "Scales": Scales,
    }
    environment.filters["seconds"] = "{:,.2f} s".format
    return environment


def _section(stage: Stage, name: str, anchor: str) -> RunSection:
    shown = {
        metric: stage.curves[metric]
        for metric in sorted(stage.curves, key=order)
        if not (is_beside(metric) or is_in_step_times(metric))
        # One or two evaluations are in the results.
        and not (metric.startswith("eval/") and len(stage.curves[metric]) <= 2)
    }
    important = TERMINAL_METRICS[stage.job].values() if stage.job else ()
    main = [n for n in important if n in shown and _changes(shown[n])][:MAX_MAIN_CURVES]
    return RunSection(
        anchor=anchor,
        name=name,
        stage=stage,
        facts=stage_facts(stage),
        results=results(stage),
        main={name: shown.pop(name) for name in main},
        times=step_times(stage.curves),
        groups=list(_groups(shown)),
    )


def _groups(curves: Mapping[str, Points]) -> Iterator[CurveGroup]:
    prefixes = dict.fromkeys(name.partition("/")[0] for name in curves)
    for prefix in sorted(prefixes, key=[*GROUPS, *prefixes].index):
        members = {n: points for n, points in curves.items() if n.partition("/")[0] == prefix}
        changing = {name: points for name, points in members.items() if _changes(points)}
        constants = {n: points[-1][1] for n, points in members.items() if n not in changing}
        yield CurveGroup(GROUPS.get(prefix, prefix), changing, constants)


def _changes(points: Points) -> bool:
    values = [value for _, value in points]
    return max(values) - min(values) > 1e-9 * max(map(abs, values))
