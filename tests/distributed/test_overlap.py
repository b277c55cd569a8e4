"""Overlap changes when gradients and weights travel, and no number."""

import json

import pytest

from tests.distributed.ranks import run_ranks

EXPERTS = {"num_experts": 4, "expert_ffn_hidden_size": 32}
TIED = {"tied_embeddings": True}
PP2 = {"pipeline_size": 2}
# Model, degrees, microbatch size, the gradient's largest norm.
CASES = {
    "DP4": ({}, {}, 1, 0.0),
    "TP2 SP DP2": ({}, {"tensor_size": 2, "sequence_parallel": True}, 2, 0.0),
    "PP2 VPP2 DP2": ({}, PP2 | {"virtual_pipeline_size": 2}, 1, 0.0),
    "PP2 DP2 tied clipped": (TIED, PP2, 2, 0.1),
    "EP2 DP4": (EXPERTS, {"expert_size": 2}, 1, 0.0),
}
CLIPPED = "PP2 DP2 tied clipped"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what every rank found in each case."""
    cases = [
        {
            "model": model,
            "parallel": parallel,
            "microbatch": {"microbatch_size": size},
            "grad_clip": grad_clip,
        }
        for model, parallel, size, grad_clip in CASES.values()
    ]
    out = tmp_path_factory.mktemp("overlap") / "out.json"
    return dict(zip(CASES, run_ranks("overlap_ranks.py", 4, out, json.dumps(cases)), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_weights_are_the_same_to_the_bit(results, name):
    """But for the norm, which is a sum over other shares of the gradient."""
    for found in results[name]:
        if name == CLIPPED:
            assert max(found["gaps"]) < 1e-6
        else:
            assert found["gaps"] == [0.0] * 4


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_the_same_also_around_a_step_that_is_skipped(results, name):
    metrics = results[name][0]["metrics"]
    for plain, overlapped in metrics:
        assert overlapped == pytest.approx(plain, rel=1e-5, abs=1e-7)
    skipped = [plain["policy/skipped_fraction"] for plain, _ in metrics]
    assert skipped == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", CASES)
def test_passes_without_a_step_still_compare(results, name):
    assert results[name][0]["cosines"] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("name", CASES)
def test_all_gradients_travel_before_the_last_backward_pass_is_over(results, name):
    """From the second step of each role on: the first learns which gradients there are."""
    for found in results[name]:
        first, later = found["sent"][:2], found["sent"][2:]
        assert not any(map(any, first))
        # One step of both roles, then each as often as ppo and the comparison take it.
        assert len(later) == 9
        assert all(map(all, later))
    stages = {len(found["sent"][0]) for found in results[name]}
    assert max(stages) > 3


@pytest.mark.parametrize("name", CASES)
def test_weights_travel_after_a_step_until_someone_asks_for_them(results, name):
    for found in results[name]:
        before, after = found["gathers"]
        assert all(before)
        assert not any(after)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_the_same_with_and_without(results, name):
    """Also where another layout wrote it."""
    assert len(results["PP2 VPP2 DP2"][0]["resumed"]) == 2
    for found in results[name]:
        for gaps in found["resumed"]:
            assert max(gaps) <= (1e-6 if name == CLIPPED else 0.0)
