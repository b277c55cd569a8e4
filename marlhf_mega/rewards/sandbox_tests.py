"""Runs the tests of one program inside a sandbox; started by `code.py`, standard library only.

Every test is a fork of this process, so that the interpreter starts once. A test has its own limit
of CPU time, which other work on the machine does not use up.

    response.py    the program
    tests.json     {"tests": [{"stdin"} or {"statements", "mark"} or {"call", "arguments", "mark"}],
                   "cpu_seconds", "wall_seconds", "output_bytes"}
    stdout         {"compiled": bool, "results": one per test, see `_run`}
"""

import contextlib
import json
import os
import resource
import select
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import CodeType
from typing import Any

MOST_TIMEOUTS = 2
"""Further tests of a program that has exceeded its time so often are not run."""


SLEEPING_SHARE = 0.003
"""A program that has had less of its time on a CPU sleeps, however busy the machine is."""


def main() -> None:
    """Compile the program, run its tests, write the results."""
    settings = json.loads(Path("tests.json").read_text(encoding="utf-8"))
    try:
        program = compile(Path("response.py").read_text(encoding="utf-8"), "response.py", "exec")
    except (SyntaxError, ValueError, OverflowError):
        json.dump({"compiled": False, "results": []}, sys.stdout)
        return
    results: list[dict[str, Any]] = []
    for test in settings["tests"]:
        if sum(result["timeout"] for result in results) >= MOST_TIMEOUTS:
            break
        results.append(_run(program, test, settings))
    json.dump({"compiled": True, "results": results}, sys.stdout)


def _run(program: CodeType, test: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Run one test in a process of its own.

    Returns:
        code: its exit code, negative after a signal; stdout, and the last line of stderr; timeout:
        it used up its CPU time, or slept; held_up: it could not use its CPU time in many times as
        much time.
    """
    child = os.fork()
    if child == 0:
        _child(program, test)
    ended, sleeps = _wait(child, settings)
    # What it has started goes with it.
    for group in (os.killpg, os.kill):
        with contextlib.suppress(OSError):
            group(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    cpu = used.ru_utime + used.ru_stime
    code = os.waitstatus_to_exitcode(status)
    # The kernel counts CPU time by ticks for the limit, and more exactly here.
    killed = ended and code in (-signal.SIGXCPU, -signal.SIGKILL)
    exhausted = cpu >= settings["cpu_seconds"] * (0.5 if killed else 1)
    limit = settings["output_bytes"]
    errors = Path("stderr").read_bytes()[-limit:].decode(errors="replace").rstrip().splitlines()
    return {
        "code": code if ended else None,
        "stdout": Path("stdout").read_bytes()[:limit].decode(errors="replace"),
        "error": errors[-1] if errors else "",
        "timeout": exhausted or sleeps,
        "held_up": not ended and not exhausted and not sleeps,
    }


def _wait(child: int, settings: dict[str, Any]) -> tuple[bool, bool]:
    """Wait until a process ends or its time is over; return whether it ended, whether it sleeps."""
    handle, start = os.pidfd_open(child), time.monotonic()
    try:
        while (waited := time.monotonic() - start) < settings["wall_seconds"]:
            patience = min(settings["cpu_seconds"], settings["wall_seconds"] - waited)
            if select.select([handle], [], [], patience)[0]:
                return True, False
            # The clock of another process's CPU time, as clock_getcpuclockid(3) makes it.
            used = time.clock_gettime((~child << 3) | 2)
            if waited > settings["cpu_seconds"] and used < SLEEPING_SHARE * waited:
                return False, True
    finally:
        os.close(handle)
    return False, False


def _child(program: CodeType, test: dict[str, Any]) -> None:
    """Become the program: its own streams, its own session, then its code and the test's."""
    os.setsid()
    Path("stdin").write_text(test.get("stdin", ""), encoding="utf-8", errors="replace")
    for number, (name, flags) in enumerate(
        (
            ("stdin", os.O_RDONLY),
            ("stdout", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            ("stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        )
    ):
        os.dup2(os.open(name, flags, 0o600), number)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    os._exit(_execute(program, test))


def _execute(program: CodeType, test: dict[str, Any]) -> int:
    """Run the program and what the test adds; return the exit code."""
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    code = 0
    try:
        exec(program, names)
        if "statements" in test:
            exec(compile(test["statements"], "test.py", "exec"), names)
        if "call" in test:
            name = test["call"]
            owner = names["Solution"]() if "Solution" in names else None
            function = names[name] if owner is None else getattr(owner, name)
            found = function(*test["arguments"])
            sys.stdout.write(test["mark"] + json.dumps(found, default=str))
        elif "mark" in test:
            sys.stdout.write(test["mark"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 a program may raise anything
        traceback.print_exc()
        code = 1
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]  # threads that are still running
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            code = code or 1
    return code & 255


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
