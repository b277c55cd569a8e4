"""A finished job says so instead of running again: `complete.json` in its run directory."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from marlhf_mega import durable
from marlhf_mega.config.schema import Config

COMPLETE_FILE = "complete.json"
_RESULTS = ("hf", "hf_critic", "report.html", "metrics.jsonl")


@dataclass(frozen=True, kw_only=True)
class Complete:
    """What a finished job has left."""

    settings: dict[str, Any]
    """The configuration as it was loaded."""
    results: Any
    """What the job has returned."""
    files: list[str]
    """Where its results are."""

    @property
    def held_out(self) -> dict[str, float]:
        """Its last held-out results."""
        last = self.results[-1] if isinstance(self.results, list) else self.results
        return last or {}

    def describe(self) -> str:
        """Say that the job is finished, and where its results are."""
        folder = self.settings["run"]["dir"]
        first = (
            f"already complete: {folder} has the results of exactly these settings, nothing was "
            "run. Raise run.steps to go on, or use another run.dir to start anew."
        )
        return "\n  ".join([first, *self.files])


def find_complete(config: Config) -> Complete | None:
    """Return what a run of exactly these settings has left in its directory, if it is all there.

    None where anything is to be done: a setting has changed, a result is gone, or
    `checkpoint.resume=never`.
    """
    try:
        found = Complete(**json.loads((config.run.dir / COMPLETE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    if found.settings != config.model_dump(mode="json") or config.checkpoint.resume == "never":
        return None
    return found if all(Path(path).exists() for path in found.files) else None


def forget_complete(config: Config) -> None:
    """Note that the run is not finished (any more)."""
    (config.run.dir / COMPLETE_FILE).unlink(missing_ok=True)


def record_complete(config: Config, results: Any, run_dirs: Iterable[Path]) -> None:
    """Note that the run is finished.

    Args:
        config: as it was loaded.
        results: what the job returns, as JSON.
        run_dirs: where results are.
    """
    files = [str(path) for folder in run_dirs for path in _results_in(folder)]
    found = Complete(settings=config.model_dump(mode="json"), results=results, files=files)
    durable.replace(config.run.dir / COMPLETE_FILE, json.dumps(asdict(found), indent=1) + "\n")


def _results_in(folder: Path) -> list[Path]:
    latest = folder / "checkpoints" / "latest"
    kept = [folder / "checkpoints" / latest.read_text().strip()] if latest.is_file() else []
    return [*(p for p in (folder / name for name in _RESULTS) if p.exists()), *kept]
