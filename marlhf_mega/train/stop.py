"""Ends that are no faults: a signal, a time limit, and a run that gets nowhere."""

import json
import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType

from marlhf_mega.config.exit_codes import EXIT_CODE_FILE, EXIT_NO_PROGRESS, EXIT_PREEMPTED
from marlhf_mega.config.schema import Config
from marlhf_mega.parallel.collectives import any_over_world, share_from_first
from marlhf_mega.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

_STARTED = time.monotonic()


class EarlyEndError(Exception):
    """The run ends before its last step, with everything saved or nothing to save."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class StopRequest:
    """Hears SIGTERM and SIGUSR1 on any rank, and watches `run.max_hours`."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._mesh = mesh
        self._limit_seconds = None if config.run.max_hours is None else config.run.max_hours * 3600
        self._signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def is_made(self) -> bool:
        """Whether any rank was asked to stop; all ranks call it after every step and agree."""
        late = self._limit_seconds is not None and (
            time.monotonic() - _STARTED >= self._limit_seconds
        )
        return any_over_world(late or self._signal is not None, self._mesh.device)

    def end(self, done: int) -> EarlyEndError:
        """Return what to raise once the checkpoint after `done` steps is saved."""
        return EarlyEndError(EXIT_PREEMPTED, f"asked to stop: saved after step {done}, start again")


def count_attempt(config: Config, first_step: int, mesh: Mesh) -> None:
    """Note that a launcher has started the run at this step; all ranks call it.

    Raises:
        EarlyEndError: with `run.max_attempts` starts the run has not got beyond the step.
    """
    if EXIT_CODE_FILE not in os.environ:
        return
    path = config.run.dir / "attempts.json"
    attempts = share_from_first(_attempts(path, first_step) if mesh.rank == 0 else 0, mesh)
    if attempts >= config.run.max_attempts:
        raise EarlyEndError(
            EXIT_NO_PROGRESS,
            f"run.max_attempts={config.run.max_attempts}: so many starts from step {first_step} "
            f"have not led to a checkpoint. Mend the cause, then remove {path}.",
        )
    if mesh.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"step": first_step, "attempts": attempts + 1})
        partial = path.with_suffix(".tmp")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)


def _attempts(path: Path, first_step: int) -> int:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return 0
    return int(found["attempts"]) if found["step"] == first_step else 0
