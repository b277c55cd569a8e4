"""Format, lint, types, shell scripts and tests: `python tools/check.py fast|full`.

`fast` runs the unit tests, `full` all of them. Ends with the ten longest functions.
"""

import argparse
import ast
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Run every check, also after one has failed; return 1 if any did."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extent", choices=["fast", "full"])
    extent = parser.parse_args().extent
    tests = ["tests/unit"] if extent == "fast" else []
    scripts = [
        ".ci/run",
        *map(
            str,
            sorted(
                [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("tests/*.sh")]
            ),
        ),
    ]
    checks = {
        "format": ["ruff", "format", "--check", "."],
        "lint": ["ruff", "check", "."],
        "types": ["mypy"],
        "scripts": ["shellcheck", "-x", *scripts],
        "tests": ["pytest", "-q", *tests],
    }
    results = {name: run(name, command) for name, command in checks.items()}
    print("\nlongest functions")
    for length, where in sorted(functions(), reverse=True)[:10]:
        print(f"{length:5} lines  {where}")
    print()
    for name, (passed, seconds) in results.items():
        print(f"{name:10} {'passed' if passed else 'FAILED'}  {seconds:6.1f} s")
    return 0 if all(passed for passed, _ in results.values()) else 1


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


def functions() -> Iterator[tuple[int, str]]:
    """Yield (lines, file:line name) of every function of the package and the tools."""
    for path in sorted([*ROOT.glob("marlhf_mega/**/*.py"), *ROOT.glob("tools/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield lines, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


if __name__ == "__main__":
    raise SystemExit(main())
