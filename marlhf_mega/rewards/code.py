"""A reward for programs: whether they compile, run, and pass tests, found out in a sandbox."""

import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from marlhf_mega.rewards.sandbox import Limits, Outcome, SandboxMode, run_python

NOT_COMPILED = -1.0
FAILED_TO_RUN = -0.6
NO_TEST_PASSED = -0.3
ALL_TESTS_PASSED = 1.0

COMPILE = "compile(open('response.py', encoding='utf-8').read(), 'response.py', 'exec')"

SHARE_OF_TIME = 0.8
"""Of the time for one response; the rest is for starting and ending sandboxes."""

_FENCED = re.compile(r"```[a-zA-Z0-9]*\s*\n(.*?)(?:```|\Z)", re.DOTALL)


def compiler_signal(
    prompt: str,
    response: str,
    *,
    tests: Sequence[Mapping[str, str] | str] | Mapping[str, Sequence[str]],
    sandbox: SandboxMode = "namespaces",
    timeout_seconds: float = 10.0,
) -> float:
    """Score a Python program by its tests, as in MA-RLHF (arXiv 2410.02743, section 4.1).

    -1 if it does not compile, -0.6 if a test ends in an error other than an assertion's or runs out
    of time or memory, else
    -0.3 + 1.3 * passed / tests: wrong answers alone lie between -0.3 and 1.

    Args:
        prompt: not used.
        response: the program, or text whose first fenced block is the program.
        tests: of the data row: a list of `{input, output}` (standard input, expected standard
            output) or of Python statements that must not raise after the program; or
            `{inputs, outputs}`, two lists of the same length.
        sandbox: the source's `sandbox` in the config.
        timeout_seconds: the config's limit for one response; the tests share it.

    Raises:
        ValueError: there is no test.
        RuntimeError: the sandbox cannot be made.
    """
    cases = list(_cases(tests))
    if not cases:
        raise ValueError("tests: must hold at least one test; there is none. Mend the row.")
    program = _program(response)
    deadline = time.monotonic() + SHARE_OF_TIME * timeout_seconds
    files = {"main.py": COMPILE, "response.py": program}
    compiled = _run(files, "", deadline, sandbox)
    if compiled.code != 0:
        return NOT_COMPILED if compiled.code == 1 else FAILED_TO_RUN
    passed = 0
    for case in cases:
        result = _passes(program, case, deadline, sandbox)
        if result is None:
            return FAILED_TO_RUN
        passed += result
    return NO_TEST_PASSED + (ALL_TESTS_PASSED - NO_TEST_PASSED) * passed / len(cases)


@dataclass(frozen=True)
class _Case:
    """One test: an expected output, or statements that must not raise."""

    stdin: str = ""
    expected: str | None = None
    statements: str = ""


def _passes(program: str, case: _Case, deadline: float, mode: SandboxMode) -> bool | None:
    """Run one test; none: it ended in an error."""
    if case.expected is not None:
        outcome = _run({"main.py": program}, case.stdin, deadline, mode)
        return _same_text(outcome.stdout, case.expected) if outcome.code == 0 else None
    # A program that ends itself before the statements has not passed them.
    mark = secrets.token_hex(8)
    text = f"{program}\n{case.statements}\nprint({mark!r})"
    outcome = _run({"main.py": text}, "", deadline, mode)
    if outcome.code == 0:
        return outcome.stdout.rstrip().endswith(mark)
    last = (outcome.stderr.rstrip().splitlines() or [""])[-1]
    return False if last.startswith("AssertionError") else None


def _cases(
    tests: Sequence[Mapping[str, str] | str] | Mapping[str, Sequence[str]],
) -> Iterator[_Case]:
    if isinstance(tests, Mapping):
        for given, expected in zip(tests["inputs"], tests["outputs"], strict=True):
            yield _Case(given, expected)
        return
    for test in tests:
        if isinstance(test, str):
            yield _Case(statements=test)
        else:
            yield _Case(test["input"], test["output"])


def _run(files: dict[str, str], stdin: str, deadline: float, mode: SandboxMode) -> Outcome:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        return Outcome(code=None)
    limits = replace(Limits(), wall_seconds=min(seconds, Limits().wall_seconds))
    return run_python(files, stdin=stdin, limits=limits, mode=mode)


def _program(response: str) -> str:
    block = _FENCED.search(response)
    return block.group(1) if block else response


def _same_text(text: str, expected: str) -> bool:
    """Compare line by line; spaces at the ends of lines and of the text do not count."""

    def lines(value: Any) -> list[str]:
        return [line.rstrip() for line in str(value).strip().splitlines()]

    return lines(text) == lines(expected)
