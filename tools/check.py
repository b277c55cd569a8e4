"""Format, lint, types, shell scripts, tests, and reports on the package's structure.

    python tools/check.py fast
    python tools/check.py full --base v0.1.0
    python tools/check.py structure --base HEAD~10

`fast` runs the unit tests, `full` all tests. Both end with the reports that `structure` prints
alone: lines of code per folder, compared with a base commit; the ten longest functions; public
names that more than one module defines. Exit codes: 0 everything passed, 1 a check failed,
2 wrong usage.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from structure import find_base, print_reports

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run every check, also after one has failed; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("extent", choices=["fast", "full", "structure"])
    parser.add_argument(
        "--base",
        metavar="REV",
        help="commit to compare with (default: the merge base with origin/main, else HEAD~1)",
    )
    options = parser.parse_args()
    try:
        base = find_base(ROOT, options.base)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    results = {} if options.extent == "structure" else run_checks(full=options.extent == "full")
    print_reports(ROOT, base)
    print()
    for name, (passed, seconds) in results.items():
        print(f"{name:10} {'passed' if passed else 'FAILED'}  {seconds:6.1f} s")
    return 0 if all(passed for passed, _ in results.values()) else 1


def run_checks(*, full: bool) -> dict[str, tuple[bool, float]]:
    """Return whether each check passed, and its seconds."""
    scripts = [".ci/run"]
    for pattern in (
        "launch/*.sh",
        "launch/recipes/*.sh",
        "launch/*.sbatch",
        "tests/*.sh",
        "tools/*.sh",
    ):
        scripts += sorted(str(path) for path in ROOT.glob(pattern))
    checks = {
        "format": ["ruff", "format", "--check", "."],
        "lint": ["ruff", "check", "."],
        "types": ["mypy"],
        "scripts": ["shellcheck", "-x", *scripts],
        "tests": ["pytest", "-q", *([] if full else ["tests/unit"])],
    }
    return {name: run(name, command) for name, command in checks.items()}


def run(name: str, command: list[str]) -> tuple[bool, float]:
    """Run one tool of this Python's environment; return whether it passed, and its seconds."""
    print(f"== {name}", flush=True)
    if command[0] == "shellcheck":  # a program, not a module
        command = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    else:
        command = [sys.executable, "-m", *command]
    start = time.perf_counter()
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    finished = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    return finished.returncode == 0, time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
