"""Runs of the same job beside each other: what was set differently, and what came of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marlhf_mega.config.checks import TrainingJob
from marlhf_mega.metrics.glossary import is_beside, order, stderr_name
from marlhf_mega.metrics.progress import TERMINAL_METRICS
from marlhf_mega.report.run import Points, Stage

_FACTS = (
    *("run.name", "run.dir", "prompt_fingerprint", "tokenizer_fingerprint"),
    "checkpoint.resume",
)
"""Keys that differ without being a difference between experiments."""
MAX_SETTINGS = 40
MAX_RUNS = 24
"""Curves that a chart can tell apart: six colours, each drawn through and in three dashes."""


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """The last value of a metric in every run."""

    name: str
    values: Sequence[tuple[float, float | None] | None]
    """(value, standard error) of each run; None where it has no such metric."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs of one job."""

    job: TrainingJob
    names: Sequence[str]
    settings: Mapping[str, Sequence[str]]
    """Key that differs -> its value in each run."""
    rows: Sequence[MetricRow]
    curves: Mapping[str, Mapping[str, Points]]
    """Metric -> run -> its values, of the runs that have several."""
    errors: Mapping[str, Mapping[str, Sequence[float]]]
    """Metric -> run -> the standard errors of these values, where they were recorded."""


def comparisons(stages: Sequence[Stage], names: Sequence[str]) -> list[Comparison]:
    """Return one comparison for each job that several runs have done.

    Args:
        stages: the runs.
        names: what each is called, all different.

    Raises:
        ValueError: there are more of one job than can be told apart.
    """
    jobs = dict.fromkeys(stage.job for stage in stages)
    found = []
    for job in jobs:
        members = {n: s for n, s in zip(names, stages, strict=True) if s.job == job}
        if job is not None and len(members) > MAX_RUNS:
            raise ValueError(
                f"report: {len(members)} runs of {job} cannot be told apart in one chart; give at "
                f"most {MAX_RUNS}."
            )
        if job is not None and len(members) > 1:
            found.append(_compare(job, members))
    return found


def _compare(job: TrainingJob, runs: Mapping[str, Stage]) -> Comparison:
    every = {name for stage in runs.values() for name in stage.curves if not is_beside(name)}
    held_out = sorted((name for name in every if name.startswith("eval/")), key=order)
    shown = dict.fromkeys([*held_out, *TERMINAL_METRICS[job].values()])
    curves = {name: series for name in shown if (series := _series(runs, name))}
    return Comparison(
        job=job,
        names=list(runs),
        settings=_different(list(runs.values())),
        rows=[
            MetricRow(name=name, values=[_last(stage, name) for stage in runs.values()])
            for name in shown
            if name in every
        ],
        curves=curves,
        errors={
            name: {run: errors for run in series if (errors := runs[run].errors(name))}
            for name, series in curves.items()
        },
    )


def _series(runs: Mapping[str, Stage], metric: str) -> dict[str, Points]:
    """Return the curves of the runs that have one; nothing if none of them changes."""
    found = {name: stage.curves.get(metric, ()) for name, stage in runs.items()}
    found = {name: points for name, points in found.items() if len(points) > 1}
    values = {value for points in found.values() for _, value in points}
    return found if len(values) > 1 else {}


def _last(stage: Stage, metric: str) -> tuple[float, float | None] | None:
    if metric not in stage.curves:
        return None
    step, value = stage.curves[metric][-1]
    return value, dict(stage.curves.get(stderr_name(metric), ())).get(step)


def _different(stages: Sequence[Stage]) -> dict[str, list[str]]:
    """Return the keys of the configurations that are not the same in all runs."""
    flat = [dict(_flat(stage.config)) for stage in stages]
    keys = dict.fromkeys(key for config in flat for key in config if key not in _FACTS)
    values = {key: [config.get(key, "-") for config in flat] for key in keys}
    different = {key: found for key, found in values.items() if len(set(found)) > 1}
    return dict(list(different.items())[:MAX_SETTINGS])


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "null" if value is None else str(value)
