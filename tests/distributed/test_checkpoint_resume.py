"""A resumed run is the uninterrupted one, bit for bit at its layout, resharded at another."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from marlhf_mega.checkpoint.metadata import read_tensors
from tests.distributed.ranks import run_ranks

TOOL = Path(__file__).parents[2] / "tools" / "checkpoint.py"

TP2_PP2 = {"tensor_size": 2, "pipeline_size": 2}
EXACT = {
    "TP2 PP2": (TP2_PP2, {}),
    "TP2 PP2 SP scalar": (TP2_PP2 | {"sequence_parallel": True}, {"head": "scalar"}),
    "PP2 DP2 tied": ({"pipeline_size": 2}, {"tied": True}),
    "PP2 VPP2 DP2": ({"pipeline_size": 2, "virtual_pipeline_size": 2}, {}),
    "TP2 DP2 bfloat16": ({"tensor_size": 2}, {"dtype": "bfloat16"}),
    "EP2 DP4 experts": (
        {"expert_size": 2},
        {"num_experts": 4, "experts_per_token": 2, "expert_ffn_hidden_size": 32},
    ),
    "TP2 CP2 SP": ({"tensor_size": 2, "context_size": 2, "sequence_parallel": True}, {}),
    "TP2 PP2 SP scalar lora": (
        TP2_PP2 | {"sequence_parallel": True},
        {"head": "scalar", "lora": {"rank": 3}},
    ),
}
RESHARD = {
    "DP4": {},
    "TP4": {"tensor_size": 4},
    "TP2 DP2": {"tensor_size": 2},
    "CP2 DP2": {"context_size": 2},
    "PP2 VPP2 DP2": {"pipeline_size": 2, "virtual_pipeline_size": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def found(root):
    cases = json.dumps({"exact": EXACT, "reshard": RESHARD, "adapters": "TP2 PP2 SP scalar lora"})
    return run_ranks("checkpoint_resume_ranks.py", 4, root / "out.json", str(root), cases)


@pytest.mark.parametrize("case", EXACT)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(found, case):
    result = found["exact"][case]
    fresh, at_save, untouched, at_load, at_end, resumed = result["digests"]
    assert untouched == at_save, "a save changes nothing"
    assert at_load == at_save
    assert resumed == at_end
    assert result["found"] == result["expected"]
    assert all(a != b for a, b in zip(fresh, at_load, strict=True))
    assert all(a != b for a, b in zip(at_save, at_end, strict=True))


@pytest.mark.parametrize("case", EXACT)
def test_what_is_written_while_training_goes_on_is_what_was_saved_at_once(found, case):
    result = found["exact"][case]
    at_once, later = result["files"]
    assert at_once == later
    assert any(name.endswith(".distcp") for name in later)
    assert not result["early"], "the folder had its name before it was written"


@pytest.mark.parametrize("case", EXACT)
def test_the_state_comes_back_as_it_was_given(found, case):
    assert found["exact"][case]["state"] == {
        "stream": {"num_consumed": 16},
        "kl_coef": 0.1,
        "moments": [3, 0.1 + 0.2, 1e-300],
    }


def test_the_learning_rate_goes_on(found):
    rates = [rate for _, _, rate in found["exact"]["TP2 PP2"]["found"]]
    assert rates == found["exact"]["TP2 PP2"]["expected"][0][2:] + rates[1:]
    assert 1e-3 < rates[1] < rates[0] < 1e-2


def test_master_weights_of_bfloat16_are_saved_in_float32(found):
    assert found["exact"]["TP2 DP2 bfloat16"]["dtypes"] == ["torch.bfloat16", "torch.float32"]


@pytest.mark.parametrize("layout", RESHARD)
def test_another_layout_goes_on_with_the_same_weights_and_moments(found, layout):
    result, base = found["reshard"][layout], found["exact"]["TP2 PP2"]
    for got, expected in zip(result["steps"], base["expected"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", RESHARD)
def test_there_and_back_changes_no_bit(found, layout):
    assert found["reshard"][layout]["back"] == found["exact"]["TP2 PP2"]["digests"][1]


def test_adapters_go_on_at_another_layout_and_their_base_is_not_saved(found, root):
    base, result = found["exact"]["TP2 PP2 SP scalar lora"], found["adapters"]["reshard"]
    for got, expected in zip(result["steps"], base["expected"], strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
    assert result["back"] != base["digests"][0]
    folder = root / "exact7" / "checkpoints" / "step_000002" / "policy"
    names = {name for name in read_tensors(folder) if not name.startswith("optimizer.")}
    assert len(names) == 1 + 4 * 4 * 2
    assert all(".lora." in name or name == "output_layer.weight" for name in names)


def test_adapters_of_another_base_are_refused(found):
    for message in found["adapters"]["refused"]:
        assert (
            "must be of the weights of this model; it has adapters of a base with hash" in message
        )
        assert len(message.splitlines()) == 1


def test_weights_alone_fill_a_reference_at_another_layout(found):
    weights = found["weights"]
    assert weights["reference_fresh"] == []
    assert weights["reference"] == pytest.approx(weights["policy"], rel=1e-5, abs=1e-6)


def test_a_float32_checkpoint_fills_a_bfloat16_model(found):
    weights = found["weights"]
    assert weights["bfloat16"] != weights["policy"]
    assert weights["bfloat16"] == pytest.approx(weights["policy"], rel=0.1, abs=0.2)


def test_a_critic_starts_from_a_reward_model_with_its_head(found):
    weights = found["weights"]
    assert weights["critic_fresh"] == []
    assert weights["critic"] == pytest.approx(weights["reward"], rel=1e-5, abs=1e-6)


def test_a_critic_from_a_policy_takes_the_body_and_keeps_its_head(found):
    weights = found["weights"]
    assert weights["body_fresh"] == ["output_layer.weight"]
    assert weights["body_flags"] == [[True, True]] * 4


def test_a_model_that_never_stepped_is_saved_and_restored(found):
    before, after = found["weights"]["never_stepped"]
    assert before == after
    assert found["weights"]["never_stepped_steps"][0] == found["weights"]["never_stepped_steps"][1]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("head", "output_layer.weight with shape [1, 32] instead of [48, 32]"),
        ("role", "must hold the model policy; it has reward"),
        ("run", "must hold a checkpoint; there is none"),
        ("width", "embedding.word_embeddings.weight with shape [64, 32] instead of [48, 16]"),
        ("depth", "with shape [4,"),
        ("unused", "also holds optimizer.state.exp_avg.output_layer.weight"),
        ("model", "must hold the model critic; it has policy"),
        ("state", "must hold the state rng; it has stream, kl_coef, moments"),
    ],
)
def test_what_does_not_fit_is_named(found, case, expected):
    message = found["weights"]["refused"][case]
    assert expected in message
    assert len(message.splitlines()) == 1


@pytest.fixture
def tool(monkeypatch, capsys):
    """tools/checkpoint.py: arguments to exit code and the lines on stdout and stderr."""
    main = runpy.run_path(str(TOOL))["main"]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        code = main()
        done = capsys.readouterr()
        return code, (done.out + done.err).splitlines()

    return call


def test_the_tool_says_how_to_use_it(tool, capsys):
    with pytest.raises(SystemExit, match="0"):
        tool("--help")
    assert "Exit codes" in capsys.readouterr().out


def test_the_tool_shows_where_a_checkpoint_comes_from_and_its_tensors(found, tool, root):
    code, lines = tool("inspect", root / "exact4")
    folder = root / "exact4" / "checkpoints" / "step_000002"
    assert code == 0
    assert lines[0].startswith(f"{folder}: step 2, ")
    assert lines[1].startswith("  written at 4 ranks: TP2 x PP1 x DP2 (gloo, cpu), with python 3.")
    assert lines[2] == "  state: stream, kl_coef, moments"
    assert lines[3].startswith("policy: 40 tensors, ")
    assert lines[3].endswith(", 2 optimizer steps")
    rows = [line.split() for line in lines[4:]]
    assert ["decoder.layers.mlp.linear_fc1.weight", "bfloat16", "4x128x32", "32", "KiB"] in rows
    assert ["optimizer.state.exp_avg.output_layer.weight", "float32", "64x32", "8", "KiB"] in rows
    assert lines[-1] == f"{folder.parent} holds step_000002"


def test_the_tool_names_every_fault_in_a_line(found, tool, root, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(root / "exact0", run)
    good = run / "checkpoints" / "step_000002"
    assert tool("verify", run) == (0, [f"{good}: 11 files, 1.106 MiB, intact"])
    bad = good.with_name("step_000004")
    shutil.copytree(good, bad)
    (bad / "state.json").unlink()
    data = bad / "policy" / "__1_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    (run / "checkpoints" / "latest").write_text("nonsense")
    code, lines = tool("verify", run)
    assert code == 1
    assert lines[0] == f"{good.parent}: latest names no checkpoint ('nonsense')"
    assert lines[1].startswith(f"{good}: 11 files")
    assert lines[2].startswith(f"{bad}: policy/__1_0.distcp has ")
    assert lines[3:] == [f"{bad}: state.json is missing"]
    code, lines = tool("verify", bad, "--json")
    assert code == 1
    assert len(json.loads(lines[0])["checkpoints"][str(bad)]["faults"]) == 2
    code, lines = tool("inspect", bad)
    assert (code, lines) == (
        1,
        [f"{bad}: must be intact; state.json is missing. Use another checkpoint."],
    )


@pytest.mark.parametrize("index", range(len(RESHARD)))
def test_the_tool_finds_no_difference_between_layouts(found, tool, root, index):
    """The rows of the vocabulary are padded to 64 at TP2 and TP4, and to 48 at TP1."""
    code, lines = tool("compare", root / "exact0", root / f"reshard{index}")
    assert (code, lines) == (0, ["policy: 40 of 40 tensors are equal"])


def test_the_tool_names_what_is_different(found, tool, root, tmp_path):
    one, other = root / "exact0", root / "never"
    code, lines = tool("compare", one, other, "--json")
    report = json.loads(lines[0])
    assert code == 1
    assert report["roles"] == {"policy": {"tensors": 40, "different": 40}}
    different = report["different"]
    assert different["policy.output_layer.weight"].startswith("largest difference ")
    assert different["policy.optimizer_steps"] == "2 and 0"
    assert different["step"] == "2 and 0"
    code, lines = tool("compare", one, root / "reward")
    assert code == 1
    assert lines[:2] == ["policy: only in one", "reward: only in one"]
    code, lines = tool("compare", one, tmp_path)
    assert code == 2
    assert lines[0].startswith(f"{tmp_path}: must be a run directory or a checkpoint; ")
