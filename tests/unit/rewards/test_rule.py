import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import pytest
import torch

from marlhf_mega.config.sections.reward import RewardTerm
from marlhf_mega.rewards.rule import RuleReward, check_importable
from marlhf_mega.rewards.scores import Scores

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _rules_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture
def rule() -> Iterator[Callable[..., RuleReward]]:
    opened = []

    def open_rule(name: str, timeout_seconds: float = 10.0) -> RuleReward:
        opened.append(RuleReward(f"rules:{name}", timeout_seconds=timeout_seconds))
        return opened[-1]

    yield open_rule
    for reward in opened:
        reward.close()


def score(reward: RuleReward, responses: list[str], **fields: object) -> Scores:
    return reward.score(["p"] * len(responses), responses, [fields] * len(responses))


def is_gone(pid: int) -> bool:
    """Whether a process has ended, even if its exit code has not been read yet."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_scores_come_back_in_order_over_many_chunks(rule):
    responses = ["word " * (index % 7) for index in range(300)]
    result = score(rule("num_words"), responses)
    assert result.scores.tolist() == [float(index % 7) for index in range(300)]
    assert result.scores.dtype == torch.float32
    assert result.valid.all()
    assert result.errors == []


def test_an_empty_batch_has_no_scores(rule):
    result = score(rule("num_words"), [])
    assert result.scores.shape == result.valid.shape == (0,)


def test_a_function_gets_the_fields_it_takes(rule):
    fields = {"reference": "yes", "weight": 2.5, "unused": [1, {"nested": None}]}
    assert score(rule("matches"), ["yes", "no"], **fields).scores.tolist() == [2.5, 0.0]
    assert score(rule("num_words"), ["a b"], **fields).scores.tolist() == [2.0]
    assert score(rule("num_fields"), ["yes"], **fields).scores.tolist() == [3.0]


def test_a_whole_row_may_be_passed_with_values_json_cannot_hold(rule):
    row = {"prompt": "of the row", "response": "of the row", "reference": date(2024, 5, 1)}
    assert rule("num_fields").score(["p"], ["r"], [row]).scores.tolist() == [1.0]
    assert rule("matches").score(["p"], ["2024-05-01"], [row]).scores.tolist() == [1.0]


def test_a_missing_field_is_named(rule):
    result = score(rule("matches"), ["yes"])
    assert result.valid.tolist() == [False]
    assert "reference" in result.errors[0]


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("raise", "raised KeyError: 'no such slot\\nsecond line'"),
        ("exit", "raised SystemExit: 3"),
        ("die", "ended its process with exit code 7"),
        ("nan", "returned nan"),
        ("inf", "returned -inf"),
        ("too large for float32", "returned 1e+300"),
        ("text", "returned str, not a number"),
        ("none", "returned NoneType, not a number"),
    ],
)
def test_a_failure_masks_its_sample_only_and_says_why(rule, response, reason):
    result = score(rule("misbehave"), ["good", response, "good"])
    assert result.valid.tolist() == [True, False, True]
    assert result.scores.tolist() == [1.0, 0.0, 1.0]
    assert result.errors == [reason]


@pytest.mark.parametrize("response", ["hang", "hang in C"])
def test_a_hang_times_out_and_masks_its_sample_only(rule, response):
    reward = rule("misbehave", timeout_seconds=0.5)
    start = time.monotonic()
    result = score(reward, ["good", response, "good", response, "good"])
    assert time.monotonic() - start < 15
    assert result.valid.tolist() == [True, False, True, False, True]
    assert result.errors == ["took longer than 0.5 s"] * 2


def test_the_process_is_started_once(rule):
    reward = rule("misbehave")
    counts = [score(reward, ["count calls"] * 100).scores[-1].item() for _ in range(3)]
    assert counts == [100, 200, 300]


def test_the_function_may_print_and_read(rule):
    result = score(rule("misbehave"), ["print", "read", "good"])
    assert result.scores.tolist() == [2.0, 0.0, 1.0]
    assert result.valid.all()


def test_a_process_that_died_between_batches_costs_no_sample(rule):
    reward = rule("num_words")
    score(reward, ["a"])
    reward._process.kill()
    reward._process.wait()
    result = score(reward, ["a b"])
    assert result.scores.tolist() == [2.0]
    assert result.valid.all()


def test_text_of_any_kind_arrives_unchanged(rule):
    texts = ["\u65e5\u672c \U0001f600", "line\nbreak\r\n\t", "\x00", '"}', "\ud800"]
    result = rule("matches").score(["p"] * 5, texts, [{"reference": text} for text in texts])
    assert result.scores.tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("rules:no_such_function", "AttributeError: module 'rules' has no attribute"),
        ("rules:not_a_function", "TypeError: not_a_function is int, not a function"),
        ("broken_rules:f", "ModuleNotFoundError: No module named 'a_package_that_does_not_exist'"),
    ],
)
def test_what_cannot_be_imported_is_refused_before_the_run(source, reason):
    with pytest.raises(ValueError, match="must name a function that can be imported") as caught:
        check_importable(source, key="evaluate.gold")
    message = str(caught.value)
    assert message.startswith(f"evaluate.gold={source}: ")
    assert reason in message
    assert message.endswith("Fix the module, or add its folder to PYTHONPATH.")
    assert "\n" not in message


def test_what_can_be_imported_passes_also_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "rule_of_this_folder.py").write_text("def f(prompt, response): return 1")
    monkeypatch.chdir(tmp_path)
    check_importable("rule_of_this_folder:f")


def test_a_function_may_be_named_by_its_file_and_use_what_lies_beside_it(tmp_path, monkeypatch):
    folder = tmp_path / "some rules.d"
    folder.mkdir()
    (folder / "lengths.py").write_text("def length(text): return len(text)")
    (folder / "my-rules.py").write_text(
        "from dataclasses import dataclass\nfrom lengths import length\n"
        "@dataclass\nclass Answer:\n    text: str\n"
        "def f(prompt, response): return length(Answer(response).text)"
    )
    monkeypatch.chdir(tmp_path)
    for source in (f"{folder}/my-rules.py:f", "some rules.d/my-rules.py:f"):
        assert RewardTerm(source=source).is_rule
        reward = RuleReward(source)
        assert score(reward, ["four", ""]).scores.tolist() == [4.0, 0.0]
        reward.close()


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("gone.py:f", "", "FileNotFoundError: there is no file {folder}/gone.py"),
        ("rule.py:g", "def f(): pass", "AttributeError: module 'rule' has no attribute 'g'"),
        ("rule.py:f", "import not_there_at_all", "ModuleNotFoundError: No module named"),
        ("rule.py:f", "def f(:", "SyntaxError: invalid syntax"),
        ("rule.py:f", "f = 1", "TypeError: f is int, not a function"),
    ],
)
def test_a_file_that_cannot_be_imported_is_refused_in_one_line(tmp_path, name, text, reason):
    (tmp_path / "rule.py").write_text(text)
    source = f"{tmp_path}/{name}"
    with pytest.raises(ValueError, match="must name a function that can be imported") as caught:
        check_importable(source)
    message = str(caught.value)
    assert message.startswith(f"reward.source={source}: ")
    assert reason.format(folder=tmp_path) in message
    assert message.endswith("Fix the file, or its path.")
    assert "\n" not in message


def test_a_module_that_vanishes_during_the_run_stops_it(tmp_path, monkeypatch):
    module = tmp_path / "vanishing.py"
    module.write_text("import os\ndef f(prompt, response): os._exit(1)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    reward = RuleReward("vanishing:f")
    module.unlink()
    with pytest.raises(
        RuntimeError, match=r"reward\.source=vanishing:f: must be importable after a restart"
    ):
        score(reward, ["a"])
    reward.close()


def test_closing_ends_the_process(rule):
    reward = rule("num_words")
    pid = reward._process.pid
    reward.close()
    assert is_gone(pid)


def test_a_time_out_also_ends_processes_that_the_function_started(rule, tmp_path):
    pids = tmp_path / "pids"
    result = rule("hang_with_child", timeout_seconds=2.0).score([str(pids)], ["r"], [{}])
    assert result.valid.tolist() == [False]
    wait_until(lambda: all(is_gone(int(pid)) for pid in pids.read_text().split()))


@pytest.mark.skipif(sys.platform != "linux", reason="uses a signal of Linux")
@pytest.mark.parametrize("response", ["hang", "hang in C"])
def test_no_process_is_left_when_its_parent_is_killed(response):
    code = (
        "from marlhf_mega.rewards.rule import RuleReward\n"
        "reward = RuleReward('rules:misbehave', timeout_seconds=600)\n"
        "print(reward._process.pid, flush=True)\n"
        f"reward.score(['p'], ['{response}'], [{{}}])\n"
    )
    paths = os.pathsep.join(filter(None, sys.path))
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths}
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.5)
    assert not is_gone(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: is_gone(worker))


def test_no_process_is_left_when_its_parent_exits_without_closing():
    code = (
        "from marlhf_mega.rewards.rule import RuleReward\n"
        "reward = RuleReward('rules:num_words')\n"
        "print(reward._process.pid)\n"
    )
    paths = os.pathsep.join(filter(None, sys.path))
    finished = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": paths},
        timeout=300,
        check=True,
    )
    assert is_gone(int(finished.stdout))


def test_hundreds_of_responses_cost_little(rule):
    reward = rule("num_words")
    responses = ["word " * 200] * 512
    score(reward, responses)
    start = time.perf_counter()
    score(reward, responses)
    assert time.perf_counter() - start < 1.0
    assert math.isclose(score(reward, responses[:1]).scores.item(), 200)
