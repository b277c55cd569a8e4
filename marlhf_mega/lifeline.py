"""A process that must not outlive its parent; also `python -m marlhf_mega.lifeline PARENT ARGS`.

A launcher that is killed cannot end what it has started. Ranks that go on without it would train
into a run directory that the next start uses as well.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

LAUNCHER = "MARLHF_LAUNCHER_PID"
"""Environment variable: the process number of the torchrun that launch/torchrun.sh has started."""

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process with its parent, even in the middle of an endless loop.

    Args:
        parent: process number of the parent; None means the present one.

    Raises:
        SystemExit: the parent was gone before this call.
    """
    present = os.getppid() if parent is None else parent
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != present:
        raise SystemExit(1)


def die_with_launcher() -> None:
    """Let a rank die with its torchrun. A process without torchrun may outlive its shell.

    Raises:
        SystemExit: torchrun was gone before this call.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.environ.get(LAUNCHER)
        die_with_parent(None if launcher is None else int(launcher))


def is_restart() -> bool:
    """Whether torchrun has started ranks before, in this launch."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def seconds_since_launch() -> float:
    """Return the age of the launch: of torchrun, which outlives its ranks, else of this process."""
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    started = int(status.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def main(script: int, arguments: list[str]) -> None:
    """Become another Python process that dies with a script.

    Args:
        script: its process number as it sees itself. A wrapper that starts Python in a container
            may be the parent in its place, so only an orphan is taken to have lost it.
        arguments: of the other Python.
    """
    die_with_parent()
    if os.getppid() == 1 != script:
        raise SystemExit(1)
    os.environ[LAUNCHER] = str(os.getpid())
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
