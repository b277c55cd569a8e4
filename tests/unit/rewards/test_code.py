"""The compiler-signal reward on programs of every kind."""

import time

import pytest

from marlhf_mega.rewards import code
from marlhf_mega.rewards.code import compiler_signal
from marlhf_mega.rewards.rule import RuleReward
from marlhf_mega.rewards.sandbox import sandbox_problem

pytestmark = pytest.mark.skipif(sandbox_problem() is not None, reason=str(sandbox_problem()))

SUMS = [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2", "output": "4"}]
RIGHT = "print(sum(map(int, input().split())))"


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (RIGHT, 1.0),
        (f"Here it is:\n```python\n{RIGHT}\n```\nDone.", 1.0),
        (f"```\n{RIGHT}", 1.0),
        ("print(3)", 0.35),
        ("print(5)", -0.3),
        ("import sys; sys.exit(0)", -0.3),
        ("print(1 / 0)", -0.6),
        ("while True: pass", -0.3),
        ("import time; time.sleep(1000)", -0.3),
        ("if input() != '1 2':\n while True: pass\nprint(3)", 0.35),
        ("import os; os.kill(os.getpid(), 9)", -0.6),
        ("x = bytearray(4 << 30)", -0.6),
        ("print((", -1.0),
        ("def f(:\n pass", -1.0),
        ("x = '\0'", -1.0),
    ],
)
def test_levels_of_the_paper(response, score):
    assert compiler_signal("", response, tests=SUMS, timeout_seconds=1) == pytest.approx(score)


def test_tests_may_be_two_lists():
    tests = {"inputs": ["1 2", "3 4", "0 0", "5 5"], "outputs": ["3", "7", "1", "10"]}
    assert compiler_signal("", RIGHT, tests=tests) == pytest.approx(-0.3 + 1.3 * 3 / 4)


def test_a_right_program_passes_however_many_tests_there_are():
    numbers = range(40)
    tests = {"inputs": [f"{i} {i}" for i in numbers], "outputs": [str(2 * i) for i in numbers]}
    start = time.monotonic()
    assert compiler_signal("", RIGHT, tests=tests) == 1.0
    alone = time.monotonic() - start
    # An interpreter for each of them would take 40 times as long as one test.
    start = time.monotonic()
    compiler_signal("", RIGHT, tests=SUMS[:1])
    assert alone < 20 * (time.monotonic() - start)


@pytest.mark.parametrize(
    "program",
    ["def add(a, b):\n return a + b", "class Solution:\n def add(self, a, b):\n  return a + b"],
)
def test_tests_may_call_a_function(program):
    """As in APPS: arguments in lists, and results plain or in a list of their own."""
    tests = {
        "fn_name": "add",
        "inputs": [[1, 2], [[1], [2]], ["a", "b"], [2, 2]],
        "outputs": [3, [[1, 2]], ["ab"], 5],
    }
    assert compiler_signal("", program, tests=tests) == pytest.approx(-0.3 + 1.3 * 3 / 4)
    missing = program.replace("add", "sub")
    assert compiler_signal("", missing, tests=tests) == -0.6


def test_standard_input_may_be_a_list_of_lines():
    program = "print(input())\nprint(input())"
    tests = {"inputs": [["1", "2"]], "outputs": [["1", "2"]]}
    assert compiler_signal("", program, tests=tests) == 1.0


def test_a_machine_without_time_for_a_test_is_not_the_programs_fault(monkeypatch):
    """Less time by the clock than the CPU time that the program uses: there is no score."""
    monkeypatch.setattr(code, "WALL_PER_CPU", 0.5)
    with pytest.raises(TimeoutError, match="this machine was too busy to run a test"):
        compiler_signal("", "while True: pass", tests=SUMS[:1], timeout_seconds=4)


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("def f(x): return 2 * x", 1.0),
        ("def f(x): return 4", 0.35),
        ("def f(x): return 0", -0.3),
        ("def g(x): return 2 * x", -0.6),
        ("import os; os._exit(0)", -0.3),
    ],
)
def test_tests_may_be_statements(response, score):
    tests = ["assert f(2) == 4", "assert f(3) == 6, 'twice three'"]
    assert compiler_signal("", response, tests=tests) == pytest.approx(score)


def test_a_row_without_tests_has_no_score():
    with pytest.raises(ValueError, match="tests: must have at least one test; there is none"):
        compiler_signal("", RIGHT, tests=[])


def test_as_a_reward_source():
    # Far less than scoring takes: the tests have limits of their own.
    reward = RuleReward("marlhf_mega.rewards.code:compiler_signal", timeout_seconds=1)
    rows = [{"tests": SUMS}, {"tests": SUMS}, {"tests": []}]
    scores = reward.score(["p"] * 3, [RIGHT, "print((", RIGHT], rows)
    reward.close()
    assert scores.scores.tolist() == [1.0, -1.0, 0.0]
    assert scores.valid.tolist() == [True, True, False]
    assert scores.errors[0].startswith("raised ValueError: tests: must have at least one test")
