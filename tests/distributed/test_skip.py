"""A gradient that is not finite on one replica changes no weight on any rank."""

import json

import pytest
from ranks import run_ranks
from safetensors.torch import load_file

LAYOUTS = {
    "TP2 DP2": {"tensor_size": 2},
    "PP2 DP2": {"pipeline_size": 2},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def steps(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("skip")
    options = [str(folder / "run"), json.dumps(LAYOUTS[request.param])]
    return run_ranks("skip_ranks.py", 4, folder / "found.json", *options), folder / "run"


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
