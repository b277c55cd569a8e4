"""Heartbeats and alarm reports of ranks, and which ranks they show to block a run."""

import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Self

from marlhf_mega.config.exit_codes import EXIT_HUNG
from marlhf_mega.config.sections.run import WatchdogConfig

WAITING = "waiting for the training ranks"
"""Phase of disaggregated rollout ranks; without a limit, since the training ranks are watched."""

LEASE_SECONDS = 30.0
"""A run directory is in use until the first rank's heartbeat, which its watchdog touches every
second, has stayed untouched for this long."""

_HEARTBEAT_BYTES = 512


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The position of a rank's main thread: a small file that it writes at every phase."""

    session: str
    """Identifies all ranks since the last restart."""
    rank: int
    pid: int
    host: str
    """Where the process id is valid, see `this_host`."""
    count: int
    """Number of phases entered so far."""
    step: int
    phase: str
    times: int = 1
    """How many times its limit the phase may take."""
    state: Literal["running", "ended", "failed"] = "running"
    reason: str = ""
    """Why it has failed."""

    def write(self, path: Path, *, create: bool = True) -> None:
        """Overwrite the file, or create it, with a single write of fixed size."""
        # The reason is cut to what is left of the file.
        taken = len(json.dumps(asdict(replace(self, reason=""))))
        reason = ascii(self.reason)[1:-1].replace("\\", "/").replace('"', "'")
        cut = replace(self, reason=reason[: _HEARTBEAT_BYTES - 1 - taken])
        content = json.dumps(asdict(cut)).encode().ljust(_HEARTBEAT_BYTES - 1) + b"\n"
        file = os.open(path, os.O_WRONLY | (os.O_CREAT if create else 0), 0o644)
        try:
            os.pwrite(file, content, 0)
        finally:
            os.close(file)

    @classmethod
    def read(cls, path: Path, session: str | None = None) -> Self | None:
        """Return a rank's heartbeat of this session, or of any; None if there is none yet."""
        try:
            heartbeat = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return heartbeat if session in (None, heartbeat.session) else None

    def is_lost(self) -> bool:
        """Whether the rank has ended before the end of the run."""
        return self.state == "failed" or self.is_gone()

    def is_gone(self) -> bool:
        """Whether this is a process of this machine that died before the end of the run."""
        if self.state == "ended" or self.host != this_host():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # of another user
            return False
        # One that was killed is a zombie until its launcher looks at it.
        return _status(self.pid)[:1] == ["Z"]

    def kill(self) -> None:
        """Kill the process immediately if it is a rank of this machine's launcher."""
        if self.host == this_host() and _status(self.pid)[1:2] == [str(os.getppid())]:
            os.kill(self.pid, signal.SIGKILL)


@dataclass(frozen=True, kw_only=True)
class AlarmReport:
    """A rank's report after an alarm: the first line of its file of stacks."""

    rank: int
    trains: bool
    """Whether the rank trains, or only generates."""
    count: int
    step: int
    phase: str
    seconds: float
    """Time in that phase so far."""
    where: str
    """The line that the main thread is at."""
    waits: bool
    """Whether that line waits for other ranks."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the report from a file of stacks."""
        with path.open(encoding="utf-8") as stream:
            return cls(**json.loads(stream.readline()))


def name_culprits(
    answers: Sequence[AlarmReport],
    silent: Sequence[Heartbeat],
    limits: WatchdogConfig,
    stacks: Path,
) -> str:
    """Name the ranks that block the run, in one line.

    These are the ranks that do not answer. If all answer, they are the ranks behind all others that
    go through the same phases, and of several those that do not wait for another rank.

    Args:
        answers: reports of the ranks that could write their stacks; at least one.
        silent: the last heartbeats of the other ranks.
        limits: the deadlines.
        stacks: the folder of stacks.
    """
    lost = [heartbeat for heartbeat in silent if heartbeat.is_lost()]
    if lost:
        said = [f"rank {n.rank} ended in step {n.step}, {n.phase}: {_why(n)}" for n in lost]
        return (
            f"run: no rank may end before the others; {_short(said)}. The others end with code "
            f"{EXIT_HUNG}, their stacks are in {stacks}. Restart the run."
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
        f"{EXIT_HUNG}, their stacks are in {stacks}. Restart the run, or raise the limit if the "
        "work takes that long."
    )


def _lowest_count(answers: Sequence[AlarmReport], *, trains: bool) -> int:
    return min(answer.count for answer in answers if answer.trains == trains)


def take_lease(path: Path, own: Heartbeat) -> Heartbeat | None:
    """Write the first rank's heartbeat unless another run uses the folder; return that run's.

    Of several starts at the same time one succeeds: each may follow on the heartbeat that it has
    found free, and only one can create the file that claims to follow on it.

    Args:
        path: of the heartbeat; its folder exists.
        own: what to write.
    """
    attempt = 0
    while True:
        before = Heartbeat.read(path)
        if before is not None and is_in_use(path, before):
            return before
        follows = "nothing" if before is None else before.session
        claim = path.with_name(f"after_{follows}.{attempt}")
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            if not _changes(path, before):
                attempt += 1  # who made that claim has died before its heartbeat
            continue
        if Heartbeat.read(path) == before:
            own.write(path)
            before = own
        for old in path.parent.glob(f"after_{follows}.*"):
            old.unlink(missing_ok=True)
        if before is own:
            return None


def _changes(path: Path, before: Heartbeat | None) -> bool:
    """Whether a heartbeat is replaced before its lease would end."""
    deadline = time.monotonic() + LEASE_SECONDS
    while time.monotonic() < deadline:
        if Heartbeat.read(path) != before:
            return True
        time.sleep(0.05)
    return False


def is_in_use(path: Path, holder: Heartbeat) -> bool:
    """Whether the run of a first rank's heartbeat goes on.

    Whether a process of another machine lives shows in its heartbeat being touched, so this takes
    up to `LEASE_SECONDS` after a run that was killed there.
    """
    if holder.state != "running":
        return False
    last = _touched(path)
    with tempfile.TemporaryFile(dir=path.parent) as probe:
        now = os.fstat(probe.fileno()).st_mtime  # by the clock of the machine that holds the files
    deadline = time.monotonic() + LEASE_SECONDS - (now - last)
    while time.monotonic() < deadline and not holder.is_gone():
        if _touched(path) != last:
            return True
        time.sleep(0.2)
    return False


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def this_host() -> str:
    """Return a name for where process ids are valid: this machine, or this container on it."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _why(lost: Heartbeat) -> str:
    killed = f"process {lost.pid} was killed, for example because memory ran out"
    return lost.reason or ("no reason given" if lost.state == "failed" else killed)


def _short(items: Sequence[str]) -> str:
    more = [f"and {len(items) - 5} more"] if len(items) > 5 else []
    return "; ".join([*items[:5], *more])


def _status(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on; none if there is no such process."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return []
    return status.rpartition(")")[2].split()
