"""Exit codes of commands, and how they get past a launcher that restarts ranks."""

import os
from pathlib import Path

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_HUNG = 70
"""A phase exceeded its limit (`watchdog`), or a rank died: torchrun restarts the ranks."""
EXIT_PREEMPTED = 75
"""Stopped by a signal or a time limit, after a checkpoint: start the run again."""
EXIT_NO_PROGRESS = 76
"""Started `run.max_attempts` times without progress: do not start it again."""

EXIT_CODE_FILE = "MARLHF_EXIT_CODE_FILE"
"""Environment variable, set by launch/torchrun.sh: file in which ranks leave the actual code.

torchrun restarts all ranks after any code but 0 and itself exits with 1, whatever theirs was."""

STOP_FILE = "MARLHF_STOP_FILE"
"""Environment variable, set by launch/torchrun.sh: file that exists once the run is to stop.

A signal is lost on ranks that are too young to hear it, and on those that are restarted later."""


def code_for_launcher(code: int) -> int:
    """Write an exit code that must not lead to a restart for the launcher, and return 0 instead.

    Without a launcher, return the code itself.
    """
    file = os.environ.get(EXIT_CODE_FILE)
    if file is None or not code:
        return code
    Path(file).write_text(f"{code}\n")  # the same on every rank of this machine
    return 0
