"""One run directory, read for the report."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from marlhf_mega.metrics.jsonl import read_lines
from marlhf_mega.metrics.svg import Points


@dataclass(frozen=True)
class Stage:
    """What one run has left in its directory."""

    name: str
    """`run.name`, or the directory's name."""
    config: dict[str, Any]
    """The resolved configuration with what was written beside it (`versions`, `layout`, ...)."""
    config_text: str
    """config.yaml as it is on disk."""
    curves: dict[str, list[tuple[float, float]]]
    """metric -> (step, value), finite values only."""
    samples: list[dict[str, Any]]
    """The lines of samples.jsonl."""


@dataclass(frozen=True)
class Change:
    """A held-out result at the first and at the last evaluation."""

    name: str
    before: float
    after: float
    before_error: float | None
    after_error: float | None

    @property
    def difference(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def standard_errors(self) -> float | None:
        """The difference in its own standard errors; none if they were not recorded."""
        if self.before_error is None or self.after_error is None:
            return None
        spread = (self.before_error**2 + self.after_error**2) ** 0.5
        return self.difference / spread if spread else None


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
    return Stage(name, config, config_text, curves, list(read_lines(run_dir / "samples.jsonl")))


def changes(stage: Stage) -> list[Change]:
    """Return every `eval/` metric of a stage that was evaluated more than once."""
    evaluated = {
        name: points
        for name, points in stage.curves.items()
        if name.startswith("eval/") and len(points) > 1 and not name.endswith("_stderr")
    }
    return [
        Change(
            name,
            points[0][1],
            points[-1][1],
            _at(stage.curves.get(stderr_name(name), []), points[0][0]),
            _at(stage.curves.get(stderr_name(name), []), points[-1][0]),
        )
        for name, points in evaluated.items()
    ]


def stderr_name(name: str) -> str:
    """Return the metric that holds the standard error of another: `x_mean` -> `x_stderr`."""
    return name.removesuffix("_mean") + "_stderr"


def _curves(records: Iterable[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                curves.setdefault(name, []).append((record["step"], float(value)))
    return curves


def _at(points: Points, step: float) -> float | None:
    return next((value for at, value in points if at == step), None)
