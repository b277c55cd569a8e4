"""Early ends of a run: a signal, a time limit, or too many starts without progress."""

import json
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from marlhf_mega import durable
from marlhf_mega.config.exit_codes import (
    EXIT_CODE_FILE,
    EXIT_NO_PROGRESS,
    EXIT_PREEMPTED,
    STOP_FILE,
)
from marlhf_mega.config.schema import Config
from marlhf_mega.lifeline import seconds_since_launch
from marlhf_mega.parallel.collectives import any_rank, broadcast_object
from marlhf_mega.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_NOTICE = (
    b"asked to stop: the run saves after this step and ends (Ctrl-\\ ends it at once, unsaved)\n"
)

_heard = threading.Event()
"""Whether this process was sent one of them."""


class EarlyEndError(Exception):
    """The run ends before its last step, with everything saved."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def hear_signals() -> None:
    """Let SIGTERM, SIGINT and SIGUSR1 only make a `StopRequest` from now on."""
    for number in STOP_SIGNALS:
        signal.signal(number, _hear)


@contextmanager
def hearing_signals() -> Iterator[None]:
    """Remember signals during one job of a script, which has a use of its own for them.

    Outside of the main thread, where Python hears no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    _heard.clear()
    hear_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hear(number: int, frame: FrameType | None) -> None:
    if not _heard.is_set() and os.environ.get("RANK", "0") == "0":
        # Not by a logger, which might be in the middle of a line; over a progress bar.
        os.write(2, (b"\r\033[K" if os.isatty(2) else b"") + _NOTICE)
    _heard.set()


class StopRequest:
    """Handles signals on any rank, the launcher's stop file, and `run.max_hours`."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self._mesh = mesh
        self._limit_seconds = None if config.run.max_hours is None else config.run.max_hours * 3600
        self._file = os.environ.get(STOP_FILE)

    def is_made(self) -> bool:
        """Whether any rank was asked to stop. All ranks call it between steps."""
        asked = _heard.is_set() or (self._file is not None and Path(self._file).exists())
        late = self._limit_seconds is not None and (seconds_since_launch() >= self._limit_seconds)
        return any_rank(late or asked, self._mesh.device)

    def end(self, done: int, *, of: str = "step") -> EarlyEndError:
        """Return the error to raise once the work up to `done` is saved."""
        return EarlyEndError(EXIT_PREEMPTED, f"asked to stop: saved after {of} {done}, start again")


def count_attempt(config: Config, first_step: int, mesh: Mesh) -> None:
    """Count a start of the run by a launcher at this step. All ranks call it.

    Raises:
        EarlyEndError: the run has been started `run.max_attempts` times at this step.
    """
    if EXIT_CODE_FILE not in os.environ:
        return
    path = config.run.dir / "attempts.json"
    attempts = broadcast_object(_attempts(path, first_step) if mesh.rank == 0 else 0)
    if attempts >= config.run.max_attempts:
        raise EarlyEndError(
            EXIT_NO_PROGRESS,
            f"run.max_attempts={config.run.max_attempts}: at most this many starts without a new "
            f"checkpoint; there were {attempts} from step {first_step}. Fix the cause, then remove "
            f"{path}.",
        )
    if mesh.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"step": first_step, "attempts": attempts + 1})
        durable.replace(path, text + "\n")


def _attempts(path: Path, first_step: int) -> int:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return int(found["attempts"]) if found["step"] == first_step else 0
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError):
        logger.warning("%s: is damaged and replaced; starts are counted from here on", path)
        return 0
