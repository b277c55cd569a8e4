"""A reward for programs: whether they compile, run and pass tests in a sandbox."""

import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from marlhf_mega.rewards.sandbox import SETUP_SECONDS, Limits, SandboxMode, run_python

NOT_COMPILED = -1.0
FAILED_TO_RUN = -0.6
NO_TEST_PASSED = -0.3
ALL_TESTS_PASSED = 1.0

WALL_PER_CPU = 20
"""A test may take so many times its CPU time by the clock, so that a busy machine fails nobody."""

RUNNER = Path(__file__).with_name("sandbox_tests.py")

_FENCED = re.compile(r"```[a-zA-Z0-9]*\s*\n(.*?)(?:```|\Z)", re.DOTALL)

Tests = Sequence[Mapping[str, Any] | str] | Mapping[str, Any]


def compiler_signal(
    prompt: str,
    response: str,
    *,
    tests: Tests,
    sandbox: SandboxMode = "namespaces",
    timeout_seconds: float = 10.0,
) -> float:
    """Score a Python program by its tests, as in MA-RLHF (arXiv 2410.02743, section 4.1).

    -1 if it does not compile; -0.6 if a test ends with an error other than an AssertionError, which
    exceeding the memory limit is; else -0.3 + 1.3 * passed / tests. A test fails that exceeds its
    CPU time or sleeps; after the second one, the program's other tests count as failed too.

    Args:
        prompt: not used.
        response: the program, or text whose first fenced block is the program.
        tests: the data row's tests: a list of `{input, output}` (standard input, expected standard
            output) or of Python statements that must not raise after the program; or
            `{inputs, outputs}`, two lists of equal length, whose entries are texts or lists of
            lines; with `fn_name` the entries of `inputs` are the arguments of that function (or
            method of a class `Solution`), those of `outputs` its results.
        sandbox: the source's `sandbox` key.
        timeout_seconds: CPU time of one test, at most 4 s.

    Raises:
        ValueError: there is no test.
        TimeoutError: this machine was too busy to run the tests: there is no score.
        RuntimeError: the sandbox cannot be created.
    """
    cases = list(_cases(tests))
    if not cases:
        raise ValueError("tests: must have at least one test; there is none. Fix the data row.")
    limits = _limits(len(cases), timeout_seconds)
    settings = {
        "tests": [case.test for case in cases],
        "cpu_seconds": limits.cpu_seconds,
        "wall_seconds": WALL_PER_CPU * limits.cpu_seconds,
        "output_bytes": limits.file_bytes // (4 * len(cases)),
    }
    files = {
        "main.py": RUNNER.read_text(encoding="utf-8"),
        "response.py": _program(response),
        "tests.json": json.dumps(settings),
    }
    outcome = run_python(files, limits=limits, mode=sandbox)
    if outcome.code is None:
        raise TimeoutError(f"the tests did not end within {limits.wall_seconds:g} s")
    try:
        found = json.loads(outcome.stdout)
    except ValueError:  # the program has ended what runs its tests
        return FAILED_TO_RUN
    if not found["compiled"]:
        return NOT_COMPILED
    return _score(cases, found["results"])


def _seconds_needed(fields: Mapping[str, Any]) -> float:
    """Return how long scoring a row may take: it grows with the number of tests."""
    count = len(list(_cases(fields["tests"])))
    limits = _limits(count, fields.get("timeout_seconds", 10.0))
    return limits.wall_seconds + 2 * SETUP_SECONDS


compiler_signal.seconds_needed = _seconds_needed  # type: ignore[attr-defined]


def _limits(num_tests: int, timeout_seconds: float) -> Limits:
    cpu = max(1, math.floor(min(timeout_seconds, Limits().cpu_seconds)))
    wall = SETUP_SECONDS + WALL_PER_CPU * cpu * num_tests
    return replace(Limits(), cpu_seconds=cpu, wall_seconds=wall)


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One test: what the sandbox gets, and what is expected of its output."""

    test: Mapping[str, Any]
    expected: Any = None
    """Standard output, or the result of a call; None: the statements must not raise."""


def _score(cases: Sequence[_Case], results: Sequence[Mapping[str, Any]]) -> float:
    passed = 0
    for case, result in zip(cases, results, strict=False):
        if result["held_up"]:
            raise TimeoutError("this machine was too busy to run a test")
        if result["timeout"]:
            continue
        failed_assertion = case.expected is None and result["error"].startswith("AssertionError")
        if result["code"] != 0 and not failed_assertion:
            return FAILED_TO_RUN
        passed += result["code"] == 0 and _is_right(case, result["stdout"])
    return NO_TEST_PASSED + (ALL_TESTS_PASSED - NO_TEST_PASSED) * passed / len(cases)


def _is_right(case: _Case, stdout: str) -> bool:
    if "mark" not in case.test:
        return _same_text(stdout, case.expected)
    # The mark shows that the program did not exit before the statements.
    _, mark, result = stdout.rpartition(case.test["mark"])
    if "call" not in case.test:
        return bool(mark)
    try:
        value = json.loads(result) if mark else None
    except ValueError:
        return False
    # Some data sets put the result into a list of its own.
    return bool(mark) and case.expected in (value, [value])


def _cases(tests: Tests) -> Iterator[_Case]:
    if isinstance(tests, Mapping):
        for given, expected in zip(tests["inputs"], tests["outputs"], strict=True):
            if tests.get("fn_name"):
                call = {"call": tests["fn_name"], "arguments": given, "mark": _mark()}
                yield _Case(test=call, expected=expected)
            else:
                yield _Case(test={"stdin": _text(given)}, expected=_text(expected))
        return
    for test in tests:
        if isinstance(test, str):
            yield _Case(test={"statements": test, "mark": _mark()})
        else:
            yield _Case(test={"stdin": _text(test["input"])}, expected=_text(test["output"]))


def _mark() -> str:
    return secrets.token_hex(8)


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _program(response: str) -> str:
    block = _FENCED.search(response)
    return block.group(1) if block else response


def _same_text(text: str, expected: str) -> bool:
    """Compare line by line, ignoring white space at the ends of lines and of the text."""

    def lines(value: Any) -> list[str]:
        return [line.rstrip() for line in str(value).strip().splitlines()]

    return lines(text) == lines(expected)
