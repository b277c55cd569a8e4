"""The compiler-signal reward on programs of every kind."""

import pytest

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
        ("while True: pass", -0.6),
        ("import os; os.kill(os.getpid(), 9)", -0.6),
        ("x = bytearray(4 << 30)", -0.6),
        ("print((", -1.0),
        ("def f(:\n pass", -1.0),
        ("x = '\0'", -1.0),
    ],
)
def test_levels_of_the_paper(response, score):
    assert compiler_signal("", response, tests=SUMS, timeout_seconds=4) == pytest.approx(score)


def test_tests_may_be_two_lists():
    tests = {"inputs": ["1 2", "3 4", "0 0", "5 5"], "outputs": ["3", "7", "1", "10"]}
    assert compiler_signal("", RIGHT, tests=tests) == pytest.approx(-0.3 + 1.3 * 3 / 4)


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
    with pytest.raises(ValueError, match="tests: must hold at least one test; there is none"):
        compiler_signal("", RIGHT, tests=[])


def test_as_a_reward_source():
    reward = RuleReward("marlhf_mega.rewards.code:compiler_signal", timeout_seconds=5)
    rows = [{"tests": SUMS}, {"tests": SUMS}, {"tests": []}]
    scores = reward.score(["p"] * 3, [RIGHT, "print((", RIGHT], rows)
    reward.close()
    assert scores.scores.tolist() == [1.0, -1.0, 0.0]
    assert scores.valid.tolist() == [True, True, False]
    assert scores.errors[0].startswith("raised ValueError: tests: must hold at least one test")
