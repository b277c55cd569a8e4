import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[2]
MA_PPO, ALOL = TESTS / "golden" / "ma_ppo_cases.json", TESTS / "golden" / "alol_cases.json"


@pytest.fixture
def check_golden(monkeypatch, capsys):
    """The tool's main function: arguments -> exit code, stdout, stderr."""
    path = TESTS.parent / "tools" / "check_golden.py"
    spec = importlib.util.spec_from_file_location("check_golden", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_golden", module)
    spec.loader.exec_module(module)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["check_golden.py", *map(str, arguments)])
        dtype = torch.get_default_dtype()
        try:
            return module.main(), *capsys.readouterr()
        finally:
            torch.set_default_dtype(dtype)

    return call


@pytest.mark.parametrize(("file", "layouts"), [(MA_PPO, 3), (ALOL, 2)])
def test_reference_vectors_are_reproduced(check_golden, file, layouts):
    code, out, err = check_golden(file)
    assert code == 0, out
    assert err == ""
    golden = json.loads(file.read_text())
    extra = len(golden.get("parsing_cases", golden.get("sampling_cases")))
    assert f"{layouts * len(golden['cases']) + extra} comparisons, all within 1e-09" in out


OUTPUTS = [
    "token_rewards",
    "macro_values",
    "macro_rewards",
    "advantages",
    "returns",
    "actor_loss",
    "actor_grad",
    "critic_loss",
    "critic_grad",
    "segment_lengths",
]


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_wrong_number_in_any_output_is_found(check_golden, tmp_path, name):
    golden = json.loads(MA_PPO.read_text())
    expected = golden["cases"][2]["outputs"]
    if isinstance(expected[name], list):
        expected[name][-1] += 1e-6 if name != "segment_lengths" else 1
    else:
        expected[name] += 1e-6
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(golden))
    code, out, _ = check_golden(file)
    assert code == 1
    # A batch has one loss, so a wrong one shows in every group of the batch.
    failures = out.count("FAILED at")
    assert failures == 3 or (failures > 3 and name.endswith("_loss"))
    assert "FAILED at " + golden["cases"][2]["id"] in out
    tolerant = 0 if name != "segment_lengths" else 1
    assert check_golden(file, "--tolerance", "1e-5")[0] == tolerant


def test_rewards_of_trailing_padding_may_be_anything(check_golden, tmp_path):
    """Nothing reads them; those of the token before are compared."""
    golden = json.loads(MA_PPO.read_text())
    case = next(c for c in golden["cases"] if c["shape"]["response_valid"] < c["shape"]["R"])
    rewards = case["outputs"]["token_rewards"]
    num_real, file = case["shape"]["response_valid"], tmp_path / "padding.json"
    rewards[num_real:] = [7.0] * (len(rewards) - num_real)
    file.write_text(json.dumps(golden))
    assert check_golden(file)[0] == 0
    rewards[num_real - 1] += 1e-6
    file.write_text(json.dumps(golden))
    assert check_golden(file)[0] == 1


def test_a_wrong_parse_is_found(check_golden, tmp_path):
    golden = json.loads(MA_PPO.read_text())
    golden["parsing_cases"][1]["segment_lengths"][0] -= 1
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(golden))
    code, out, _ = check_golden(file)
    assert code == 1
    assert "FAILED at " + golden["parsing_cases"][1]["id"] in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "must be a readable JSON file; "),
        ("{", "must be a readable JSON file; "),
        ("[]", "must be a golden file; "),
        ('{"format": "other/1"}', "must be a golden file; ValueError: format='other/1'"),
        ('{"format": "ma_ppo_golden/1", "cases": []}', "must be a golden file; ValueError: "),
        ('{"format": "ma_ppo_golden/1", "cases": [{"group": "core"}]}', "must be a golden file; "),
    ],
)
def test_an_unusable_file_is_refused_in_one_line(check_golden, tmp_path, text, message):
    file = tmp_path / "golden.json"
    if text is not None:
        file.write_text(text)
    code, out, err = check_golden(file)
    assert (code, out) == (2, "")
    assert err.startswith(f"file={file}: {message}")
    assert err.count("\n") == 1
