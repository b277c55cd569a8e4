"""What ranks note of themselves for each other, and how that names who holds up a run."""

import json
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from marlhf_mega.config.exit_codes import EXIT_HUNG
from marlhf_mega.config.schema import WatchdogConfig

WAITING = "waiting for the training ranks"
"""Phase of a rank that only generates: without a limit, since theirs are watched."""

_NOTE_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class Note:
    """Where a rank's main thread is: a small file that the rank writes at every phase."""

    session: str
    """Of all ranks since the last restart."""
    rank: int
    pid: int
    host: str
    """What the process number is valid in."""
    count: int
    """Phases entered so far."""
    step: int
    phase: str
    state: Literal["running", "ended", "failed"] = "running"

    def write(self, path: Path) -> None:
        """Replace the file's content in one piece of fixed size."""
        content = json.dumps(asdict(self)).encode().ljust(_NOTE_BYTES - 1) + b"\n"
        file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(file, content, 0)
        finally:
            os.close(file)

    @classmethod
    def read(cls, path: Path, session: str) -> Self | None:
        """Return a rank's note of this session, none while there is none."""
        try:
            note = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
        return note if note.session == session else None

    def is_gone(self) -> bool:
        """Whether this is a process of this machine that died before its end."""
        if self.state == "ended" or self.host != this_host():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def kill(self) -> None:
        """Kill the process at once if it is a rank of this machine's launcher."""
        if self.host == this_host() and _parent(self.pid) == os.getppid():
            os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a rank says of itself after an alarm: the first line of its file of stacks."""

    rank: int
    trains: bool
    """Whether it trains, or only generates."""
    count: int
    step: int
    phase: str
    seconds: float
    """In that phase."""
    where: str
    """The innermost line of the main thread."""
    waits: bool
    """Whether that line waits for other ranks."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it from a file of stacks."""
        with path.open(encoding="utf-8") as stream:
            return cls(**json.loads(stream.readline()))


def describe(
    answers: Sequence[Answer], silent: Sequence[Note], limits: WatchdogConfig, stacks: Path
) -> str:
    """Name the ranks that hold up the run, in one line.

    Those are the ranks that do not answer, else those behind all others that go through the same
    phases; of several, those that do not wait for another rank.

    Args:
        answers: of the ranks that could write their stacks; at least one.
        silent: the last notes of the others.
        limits: the deadlines.
        stacks: the folder of stacks.
    """
    lost = [note for note in silent if note.state == "failed" or note.is_gone()]
    if lost:
        said = [f"rank {n.rank} has gone in step {n.step}, {n.phase}" for n in lost]
        return (
            f"run: no rank may end before the others; {_short(said)}. Its own last lines say why. "
            f"The others end with code {EXIT_HUNG}, their stacks are in {stacks}. Start again."
        )
    if silent:
        phase = silent[0].phase
        said = [f"rank {n.rank} was last seen in step {n.step}, {n.phase}" for n in silent]
        said.append("no answer: stopped, or the machine is gone")
    else:
        asked = [a for a in answers if a.phase != WAITING]
        behind = [a for a in asked if a.count == _lowest_count(asked, trains=a.trains)]
        busy = [answer for answer in behind if not answer.waits] or behind
        phase = busy[0].phase
        said = [
            f"rank {a.rank} has been in step {a.step}, {a.phase}, for {a.seconds:g} s at {a.where}"
            for a in busy
        ]
    key, limit = limits.limit_of(phase)
    return (
        f"{key}={limit}: no phase may take longer; {_short(said)}. All ranks end with code "
        f"{EXIT_HUNG}, their stacks are in {stacks}. Start again, or raise the limit if the work "
        "takes that long."
    )


def _lowest_count(answers: Sequence[Answer], *, trains: bool) -> int:
    return min(answer.count for answer in answers if answer.trains == trains)


def this_host() -> str:
    """Name what process numbers are valid in: this machine, or this container of it."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _short(items: Sequence[str]) -> str:
    more = [f"and {len(items) - 5} more"] if len(items) > 5 else []
    return "; ".join([*items[:5], *more])


def _parent(pid: int) -> int | None:
    """Return a process's parent, from the kernel's table: after the name in brackets."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])
