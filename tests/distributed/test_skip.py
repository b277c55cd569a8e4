"""A gradient that is not finite on one replica changes no weight on any rank."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import run_ranks

LAYOUTS = {
    "TP2 DP2": {"tensor_size": 2},
    "PP2 DP2": {"pipeline_size": 2},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("skip")
    options = [str(folder / "run"), json.dumps(LAYOUTS[request.param])]
    return run_ranks("skip_ranks.py", 4, folder / "found.json", *options), folder / "run"


@pytest.fixture
def steps(results):
    found, run_dir = results
    return found["steps"], run_dir


def test_a_minibatch_in_which_no_sample_counts_moves_no_weight_and_is_counted(results):
    """The step before leaves moments by which Adam would move."""
    (moved, metrics), (same, skipped) = results[0]["empty"]
    assert not moved
    assert metrics["policy/skipped_fraction"] == metrics["critic/skipped_fraction"] == 0.0
    assert same
    assert skipped["policy/skipped_fraction"] == skipped["critic/skipped_fraction"] == 1.0
    assert "policy/loss" not in skipped


def test_one_log_prob_that_is_not_a_number_costs_its_sample_only(results):
    found = results[0]["poisoned"]
    assert found["metrics"]["rollout/invalid_fraction"] == 1 / 8
    assert [part["finite"] for part in found["parts"]] == [True, True]
    counting = [flag for part in found["parts"] for flag in part["counting"]]
    assert counting == [True] * 4 + [False] + [True] * 3
    whitened = torch.tensor([a for part in found["parts"] for a in part["advantages"]])
    assert whitened.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert whitened.var().item() == pytest.approx(1.0, abs=1e-3)


def test_only_the_poisoned_model_rests_and_it_rests_everywhere(steps):
    found, _ = steps
    for step, bad in zip(found, [True, True, False, True, True, True], strict=True):
        assert step["policy_same"] == [bad] * 4
        assert step["critic_same"] == [False] * 4
        assert step["metrics"]["policy/skipped_fraction"] == float(bad)
        assert step["metrics"]["critic/skipped_fraction"] == 0
        assert ("policy/loss" in step["metrics"]) is not bad


def test_the_minibatch_is_kept(steps):
    folder = steps[1] / "skipped"
    names = sorted(p.name for p in folder.iterdir())
    assert len(names) == 2 * 5
    whole = load_file(folder / "step_000001_policy_replica0_1.safetensors")
    bad = load_file(folder / "step_000001_policy_replica1_1.safetensors")
    assert not any(tensor.isnan().any() for tensor in whole.values())
    assert [name for name, tensor in bad.items() if tensor.isnan().any()] in (
        [["0.advantages"], ["1.advantages"]]
    )
    assert "0.tokens" in whole


def test_the_run_stops_after_too_many_in_a_row(steps):
    found, run_dir = steps
    assert [step["errors"] for step in found[:5]] == [[None] * 4] * 5
    message = (
        "run.max_skipped_steps=2: no more optimizer steps may be skipped in a row; 3 gradients of "
        f"policy were not finite, the last at step 6. Look at {run_dir / 'skipped'}, or lower "
        "policy.lr."
    )
    assert found[5]["errors"] == [message] * 4
