"""The comparison of two ways to compute a gradient: by hand on one rank, alike on all layouts."""

import json

import pytest

from marlhf_mega.config.sections.hardware import PrecisionConfig
from marlhf_mega.update.fp8_guard import Divergence
from tests.distributed.ranks import run_ranks

MODEL = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 128,
    "vocab_size": 50,
    "init_std": 0.2,
}
TP2, PP2 = {"tensor_size": 2}, {"pipeline_size": 2}
LAYOUTS = {
    "TP2 DP2": TP2,
    "TP2 PP2 SP": TP2 | PP2 | {"sequence_parallel": True},
    "PP2 VPP2 DP2": PP2 | {"virtual_pipeline_size": 2},
}
SAME = {"logprob_gap": 0.0, "logprob_gap_max": 0.0, "gradient_cosine": pytest.approx(1.0)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divergence")
    # Without Transformer Engine FP8 is computed as float32 is.
    case = {"model": MODEL, "precision": {"fp8": "hybrid", "fp8_on_divergence": "leave"}}
    one = run_ranks("divergence_ranks.py", 1, folder / "one.json", json.dumps([case]))
    cases = [case | {"parallel": parallel} for parallel in LAYOUTS.values()]
    four = run_ranks("divergence_ranks.py", 4, folder / "four.json", json.dumps(cases))
    return {"TP1": one[0]} | dict(zip(LAYOUTS, four, strict=True))


@pytest.mark.parametrize("layout", ["TP1", *LAYOUTS])
def test_nothing_differs_from_itself(results, layout):
    assert results[layout]["same"] == results[layout]["without FP8"] == SAME


def test_one_rank_gives_the_numbers_by_hand(results):
    found = results["TP1"]
    assert found["scaled"] == pytest.approx(found["by hand"], rel=1e-5)
    assert found["scaled"]["gradient_cosine"] < 0.99


def test_bfloat16_is_near_float32_but_not_the_same(results):
    found = results["TP1"]["bfloat16"]
    assert 0.001 < found["logprob_gap"] < found["logprob_gap_max"] < 1
    assert 0.99 < found["gradient_cosine"] < 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_numbers_of_one_rank(results, layout):
    assert results[layout]["scaled"] == pytest.approx(results["TP1"]["scaled"], rel=1e-4)


@pytest.mark.parametrize("layout", ["TP1", *LAYOUTS])
def test_fp8_is_left_where_it_is_too_far_and_no_gradient_stays(results, layout):
    assert results[layout]["formats"] == [[False, "hybrid"], [True, None]]
    assert results[layout]["left over"] == 0


@pytest.mark.parametrize(
    ("gap", "cosine", "too_much"),
    [
        (0.1, 0.9, False),
        (0.11, 0.9, True),
        (0.1, 0.89, True),
        (float("nan"), 1.0, True),
        (0.0, float("nan"), True),
    ],
)
def test_either_threshold_counts(gap, cosine, too_much):
    found = Divergence(logprob_gap=gap, logprob_gap_max=gap, gradient_cosine=cosine)
    limits = PrecisionConfig(fp8_max_logprob_gap=0.1, fp8_min_cosine=0.9)
    assert found.exceeds(limits) == too_much
