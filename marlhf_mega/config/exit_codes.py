"""What the exit code of a command says, and how it passes a launcher that restarts ranks."""

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_HUNG = 70
"""A phase took longer than its limit (`watchdog`), or a rank was gone: torchrun starts again."""
EXIT_PREEMPTED = 75
"""Stopped by a signal or a time limit, with a checkpoint: start it again."""
EXIT_NO_PROGRESS = 76
"""Started often enough without getting further: do not start it again."""

EXIT_CODE_FILE = "MARLHF_EXIT_CODE_FILE"
"""Environment variable of launch/torchrun.sh: where ranks leave a code that torchrun must not see.

torchrun restarts all ranks after any code but 0, and ends with 1 whatever theirs was."""
