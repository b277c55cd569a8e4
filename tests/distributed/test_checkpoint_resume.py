"""A resumed run is the uninterrupted one, bit for bit at its layout, resharded at another."""

import json

import pytest
from ranks import run_ranks

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
}
RESHARD = {
    "DP4": {},
    "TP4": {"tensor_size": 4},
    "TP2 DP2": {"tensor_size": 2},
    "PP2 VPP2 DP2": {"pipeline_size": 2, "virtual_pipeline_size": 2},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    cases = json.dumps({"exact": EXACT, "reshard": RESHARD})
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
        ("run", "must hold a checkpoint that can be loaded; there is none"),
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
