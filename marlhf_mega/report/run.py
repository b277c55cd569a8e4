"""One run directory, read for the report."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from marlhf_mega.config.checks import TrainingJob
from marlhf_mega.data.files import read_objects
from marlhf_mega.metrics.glossary import (
    WIN_RATES,
    change_name,
    clear_change,
    is_beside,
    lookup,
    order,
    other_name,
    stderr_name,
)
from marlhf_mega.metrics.jsonl import read_lines
from marlhf_mega.metrics.pairs import HELD_OUT_PAIRS, JudgedPair

_WIN_RATES = ("eval/win_rate", *WIN_RATES.values())
_GROUP_OF: dict[TrainingJob, str] = {
    "sft": "sft",
    "reward": "reward",
    "preference": "preference",
    "offline": "offline",
    "ppo": "rollout",
}
"""Job -> the metrics that it alone writes."""

Points = Sequence[tuple[float, float]]
"""(step, value), steps ascending, values finite."""


@dataclass(frozen=True)
class Stage:
    """What one run has left in its directory."""

    name: str
    """`run.name`, or the directory's name."""
    config: Mapping[str, Any]
    """The resolved configuration and the facts beside it (`versions`, `layout`, ...)."""
    config_text: str
    """config.yaml as it is on disk."""
    curves: Mapping[str, Points]
    """metric -> its values."""
    samples: Sequence[Mapping[str, Any]] = ()
    """The lines of samples.jsonl."""
    macro_actions: Sequence[Mapping[str, Any]] = ()
    """The lines of macro_actions.jsonl."""
    pairs: Sequence[JudgedPair] = ()
    """The lines of held_out_pairs.jsonl."""

    @property
    def job(self) -> TrainingJob | None:
        """The job that wrote the metrics; None if none did."""
        groups = {name.partition("/")[0] for name in self.curves}
        return next((job for job, group in _GROUP_OF.items() if group in groups), None)

    def errors(self, metric: str) -> Sequence[float]:
        """Return the standard error of each value of a metric, 0 where none was recorded.

        Nothing for a metric that has none.
        """
        recorded = dict(self.curves.get(stderr_name(metric), ()))
        return [recorded.get(step, 0.0) for step, _ in self.curves[metric]] if recorded else ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """A held-out metric at the last evaluation and, where there was one, before training."""

    name: str
    after: float
    after_error: float | None
    before: float | None = None
    """At step 0, or of the other policy that an evaluation compares with."""
    before_error: float | None = None
    is_before_other: bool = False
    """Whether `before` is that of another policy."""
    change: float | None = None
    """After minus before; of a win rate, what it is above one half."""
    change_error: float | None = None
    interval: tuple[float, float] | None = None
    """95 % interval of a win rate over another policy."""
    higher_is_better: bool | None = None

    @property
    def standard_errors(self) -> float | None:
        """The change in its own standard errors; None if they were not recorded."""
        return self.change / self.change_error if self.change and self.change_error else None

    @property
    def verdict(self) -> Literal["good", "bad"] | None:
        """Whether a metric that has a good direction has clearly moved."""
        return clear_change(self.change, self.change_error, self.higher_is_better)


def read_stage(run_dir: Path) -> Stage:
    """Read a run directory; metrics.jsonl must be there, the rest may be missing.

    Raises:
        ValueError: there is no metrics.jsonl.
    """
    if not (run_dir / "metrics.jsonl").is_file():
        raise ValueError(
            f"{run_dir}: must be a run directory; it has no metrics.jsonl. Give run.dir of a run."
        )
    config_path = run_dir / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8") if config_path.exists() else ""
    parsed = OmegaConf.to_container(OmegaConf.create(config_text)) if config_text else {}
    config = {str(key): value for key, value in parsed.items()} if isinstance(parsed, dict) else {}
    name = str(config.get("run", {}).get("name") or run_dir.resolve().name)
    curves = _curves(read_lines(run_dir / "metrics.jsonl"))
    samples, macro_actions = (
        list(read_lines(run_dir / f"{file}.jsonl")) for file in ("samples", "macro_actions")
    )
    held_out = run_dir / HELD_OUT_PAIRS
    rows = read_objects(held_out) if held_out.is_file() else ()
    pairs = [JudgedPair(**row) for _, row in rows]
    return Stage(name, config, config_text, curves, samples, macro_actions, pairs)


def results(stage: Stage) -> list[Result]:
    """Return the held-out metrics of a stage, the most telling first."""
    names = [n for n in stage.curves if n.startswith("eval/") and not is_beside(n)]
    return [_result(name, stage) for name in sorted(names, key=order)]


def _result(name: str, stage: Stage) -> Result:
    last, after = stage.curves[name][-1]
    # A reward model in training has no right level of its scores.
    has_level = name != "eval/score_mean" or stage.job != "reward"
    direction = lookup(name).higher_is_better if has_level else None

    def at(name: str, step: float) -> float | None:
        return dict(stage.curves.get(name, ())).get(step)

    error = at(stderr_name(name), last)
    if name in _WIN_RATES:
        low, high = at(f"{name}_low", last), at(f"{name}_high", last)
        return Result(
            interval=None if low is None or high is None else (low, high),
            name=name,
            after=after,
            after_error=error,
            change=after - 0.5,
            change_error=error,
            higher_is_better=direction,
        )
    is_before_other = other_name(name) in stage.curves
    start, step = (other_name(name), last) if is_before_other else (name, 0)
    has_start = is_before_other or last > 0
    before, before_error = (at(n, step) if has_start else None for n in (start, stderr_name(start)))
    change = at(change_name(name), last)
    change_error = at(stderr_name(change_name(name)), last)
    if change is None and before is not None:
        change = after - before
        if error is not None and before_error is not None:
            change_error = math.hypot(error, before_error)
    return Result(
        name=name,
        after=after,
        after_error=error,
        before=before,
        before_error=before_error,
        is_before_other=is_before_other,
        change=change,
        change_error=change_error,
        higher_is_better=direction,
    )


def _curves(records: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                curves.setdefault(name, []).append((record["step"], float(value)))
    return dict(curves)
