"""The rollout's own layout: the same tokens and log-probs, weights moved bit for bit."""

import json

import pytest

from tests.distributed.ranks import run_ranks

PP2 = {"pipeline_size": 2}
TP2_PP2 = PP2 | {"tensor_size": 2}
TIED, UNTIED = {"tied_embeddings": True}, {"tied_embeddings": False}
EXPERTS = {
    "architecture": "mixtral",
    "qk_norm": False,
    "qkv_bias": False,
    "num_experts": 4,
    "experts_per_token": 2,
}
MODELS = {"untied": UNTIED, "tied": TIED, "mixtral": EXPERTS}
CASES = {
    "4 replicas": (TP2_PP2, {"tensor_size": 1, "pipeline_size": 1}, UNTIED),
    "4 replicas, tied": (TP2_PP2, {"tensor_size": 1, "pipeline_size": 1}, TIED),
    "TP2, SP in training": (
        TP2_PP2 | {"sequence_parallel": True},
        {"pipeline_size": 1},
        UNTIED,
    ),
    "TP4 from PP2": (PP2, {"tensor_size": 4, "pipeline_size": 1}, TIED),
    "PP4 from PP2 VPP2": (
        {"pipeline_size": 2, "virtual_pipeline_size": 2},
        {"pipeline_size": 4},
        TIED,
    ),
    "experts": ({"pipeline_size": 2, "expert_size": 2}, {"pipeline_size": 1}, EXPERTS),
    "experts, PP2 from TP2": (
        {"tensor_size": 2, "sequence_parallel": True, "expert_size": 2},
        {"tensor_size": 1, "pipeline_size": 2},
        EXPERTS,
    ),
}
STOPPED = ["stops", *MODELS]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run every case, and every model where it is trained."""
    keys = ("parallel", "rollout", "model")
    cases = {name: dict(zip(keys, case, strict=True)) for name, case in CASES.items()}
    cases |= {name: {"parallel": PP2, "rollout": {}, "model": m} for name, m in MODELS.items()}
    cases["stops"] = {"parallel": TP2_PP2, "rollout": {}, "model": UNTIED}
    for name in STOPPED:
        cases[name]["stops"] = True
    out = tmp_path_factory.mktemp("reshard") / "4.json"
    found = run_ranks("reshard_ranks.py", 4, out, json.dumps(list(cases.values())))
    return dict(zip(cases, found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_rollouts_do_not_depend_on_their_layout(results, name):
    model = next(key for key, value in MODELS.items() if value == CASES[name][2])
    expected, found = results[model]["rollouts"], results[name]["rollouts"]
    for phase, rollout in expected.items():
        assert found[phase]["responses"] == rollout["responses"]
        assert found[phase]["finished"] == rollout["finished"]
        for row, wanted in zip(found[phase]["logprobs"], rollout["logprobs"], strict=True):
            assert row == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert expected["sampled"]["responses"] != expected["after_update"]["responses"]


@pytest.mark.parametrize("name", [*CASES, *MODELS])
def test_fewer_prompts_than_stages_and_replicas_are_judged_alike(results, name):
    model = name if name in MODELS else next(k for k, v in MODELS.items() if v == CASES[name][2])
    expected, found = results[model]["judged"], results[name]["judged"]
    assert found["3"]["answers"] == expected["3"]["answers"]
    assert found["1"]["answers"] == expected["3"]["answers"][:1]
    for number, answers in ((n, found[n]["answers"]) for n in found):
        mean = sum(map(len, answers)) / len(answers)
        assert found[number]["metrics"]["eval/response_tokens"] == pytest.approx(mean)


@pytest.mark.parametrize("name", CASES)
def test_weights_travel_bit_for_bit_there_and_back(results, name):
    weights = results[name]["weights"]
    assert all(weights["arrived"])
    assert all(weights["came_back"])
    assert all(weights["released"])
    assert all(weights["main_mesh_rules"])
    assert min(weights["rounds"]) > 3 or weights["sent"] == [0] * 4


@pytest.mark.parametrize("name", CASES)
def test_every_rank_can_get_whole_tensors_in_small_buckets(results, name):
    assert all(results[name]["weights"]["arrived_whole"])


@pytest.mark.parametrize("name", STOPPED)
def test_responses_stop_at_every_end_token_and_text(results, name):
    """Against the same draws without an end, cut by hand."""
    found = results[name]["stopped"]
    whole, ids, text = found["whole"]["responses"], found["ids"], found["text"]
    assert found["whole"]["finished"] == [False] * 4
    cut = [next((r[: i + 1] for i, t in enumerate(r) if t in ids), r) for r in whole]
    assert found["at_ids"]["responses"] == cut
    assert found["at_ids"]["finished"] == [r[-1] in ids for r in cut]
    assert any(r[-1] == ids[1] and len(r) < 12 for r in cut)
    ends = [next((i for i in range(3, 13) if r[i - 3 : i] == text), 12) for r in whole]
    assert found["at_text"]["responses"] == [r[:end] for r, end in zip(whole, ends, strict=True)]
    assert found["at_text"]["finished"] == [
        r[end - 3 : end] == text for r, end in zip(whole, ends, strict=True)
    ]
    assert found["at_text"]["finished"][2]
