"""The result does not depend on the layout: PPO, reward model and rollouts against one rank."""

import json

import pytest
from ranks import run_ranks

LAYOUTS = {
    "TP1": (1, {}, 4),
    "TP1 microbatch 1": (1, {}, 1),
    "TP2": (2, {"tensor_size": 2}, 4),
    "TP2 SP": (2, {"tensor_size": 2, "sequence_parallel": True}, 2),
    "PP2": (2, {"pipeline_size": 2}, 2),
    "PP2 VPP2": (2, {"pipeline_size": 2, "virtual_pipeline_size": 2}, 4),
    "DP2": (2, {}, 2),
    "TP2 PP2": (4, {"tensor_size": 2, "pipeline_size": 2}, 2),
    "TP2 PP2 SP": (4, {"tensor_size": 2, "pipeline_size": 2, "sequence_parallel": True}, 4),
    "TP4": (4, {"tensor_size": 4}, 8),
    "PP4": (4, {"pipeline_size": 4}, 1),
    "DP4": (4, {}, 2),
    "PP2 VPP2 DP2": (4, {"pipeline_size": 2, "virtual_pipeline_size": 2}, 2),
}
WEIGHTS = {"untied": False, "tied": True}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Start each world size once, all its layouts in one go."""
    found = {}
    for world in (1, 2, 4):
        names = [
            (layout, weights)
            for layout in LAYOUTS
            if LAYOUTS[layout][0] == world
            for weights in WEIGHTS
        ]
        cases = [
            {
                "parallel": LAYOUTS[layout][1],
                "microbatch_size": LAYOUTS[layout][2],
                "tied": WEIGHTS[weights],
            }
            for layout, weights in names
        ]
        out = tmp_path_factory.mktemp("layouts") / f"{world}.json"
        answers = run_ranks("layout_ranks.py", world, out, json.dumps(cases))
        found |= dict(zip(names, answers, strict=True))
    return found


def flat(value):
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in flat(value[key])]
    if isinstance(value, list):
        return [x for item in value for x in flat(item)]
    return [value]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "TP1"])
def test_every_number_is_that_of_one_rank(results, layout, weights):
    expected, found = results["TP1", weights], results[layout, weights]
    assert found["ppo"]["greedy"] == expected["ppo"]["greedy"]
    assert found["ppo"]["sampled"] == expected["ppo"]["sampled"]
    for job in ("ppo", "reward"):
        for name, value in expected[job].items():
            assert flat(found[job][name]) == pytest.approx(flat(value), rel=1e-5, abs=2e-5), name


def test_the_case_is_not_trivial(results):
    ppo = results["TP1", "untied"]["ppo"]
    assert len({len(r) for r in ppo["sampled"]}) > 1
    assert ppo["sampled"] != ppo["greedy"]
    assert ppo["metrics"]["policy/grad_norm"] > 0.01
    assert ppo["metrics"]["policy/kl"] != 0
    assert flat(ppo["logprobs_after"]) != pytest.approx(flat(ppo["old_logprobs"]), abs=1e-4)
