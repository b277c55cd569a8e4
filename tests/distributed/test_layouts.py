"""The result does not depend on the layout: PPO, reward model and rollouts against one rank."""

import json

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file

TP2, PP2, TP4 = {"tensor_size": 2}, {"pipeline_size": 2}, {"tensor_size": 4}
CP2 = {"context_size": 2}
SP, VPP2, EP2 = {"sequence_parallel": True}, {"virtual_pipeline_size": 2}, {"expert_size": 2}
BUDGET = {"microbatch_size": 2, "microbatch_tokens": 40}
PACKING = BUDGET | {"packing": True}
# World size, degrees, microbatch size or keys of ppo.
LAYOUTS = {
    "TP1": (1, {}, 4),
    "TP1 microbatch 1": (1, {}, {"microbatch_size": 1, "scoring_microbatch_factor": 3}),
    "TP2": (2, TP2, 4),
    "TP2 SP": (2, TP2 | SP, 2),
    "PP2": (2, PP2, 2),
    "PP2 VPP2": (2, PP2 | VPP2, 4),
    "DP2": (2, {}, 2),
    "TP2 PP2": (4, TP2 | PP2, 2),
    "TP2 PP2 SP": (4, TP2 | PP2 | SP, 4),
    "TP4": (4, TP4, 8),
    "PP4": (4, {"pipeline_size": 4}, 1),
    "DP4": (4, {}, 2),
    "PP2 VPP2 DP2": (4, PP2 | VPP2, 2),
    # Without Transformer Engine only the rows are as FP8 needs them, 16 on every rank.
    "TP1 FP8 rows": (1, {}, 4),
    "TP2 PP2 SP FP8 rows": (4, TP2 | PP2 | SP, 4),
    "EP2": (2, EP2, 2),
    "TP2 SP EP2": (2, TP2 | SP | EP2, 4),
    "PP2 EP2": (4, PP2 | EP2, 2),
    "CP2": (2, CP2, 4),
    "CP4": (4, {"context_size": 4}, 8),
    "TP2 CP2 SP": (4, TP2 | CP2 | SP, 4),
    "PP2 VPP2 CP2": (4, PP2 | VPP2 | CP2, 2),
    "CP2 EP2": (2, CP2 | EP2, 4),
    "TP2 SP tokens": (2, TP2 | SP, BUDGET | {"scoring_microbatch_factor": 2}),
    "DP2 tokens": (2, {}, BUDGET),
    "EP2 tokens": (2, EP2, BUDGET),
    "PP2 VPP2 DP2 tokens": (4, PP2 | VPP2, BUDGET),
    "TP1 packed": (1, {}, PACKING),
    "TP2 SP packed": (2, TP2 | SP, PACKING),
    "DP2 packed": (2, {}, {"microbatch_size": 2, "packing": True}),
    "EP2 packed": (2, EP2, PACKING),
    "CP2 packed": (2, CP2, PACKING | {"microbatch_tokens": 44}),
    "TP2 CP2 SP FP8 rows packed": (4, TP2 | CP2 | SP, {"microbatch_size": 3, "packing": True}),
    "CP2 DP2 tokens": (4, CP2, BUDGET),
    "TP2 PP2 SP packed": (4, TP2 | PP2 | SP, PACKING),
    "PP2 VPP2 DP2 packed": (4, PP2 | VPP2, PACKING),
    "TP2 PP2 SP FP8 rows packed": (4, TP2 | PP2 | SP, PACKING),
}
TOKENS = ["TP2 SP tokens", "DP2 tokens", "PP2 VPP2 DP2 tokens", "CP2 DP2 tokens"]
PACKED = [
    "CP2 packed",
    "TP2 CP2 SP FP8 rows packed",
    "TP2 SP packed",
    "DP2 packed",
    "PP2 VPP2 DP2 packed",
    "TP2 PP2 SP FP8 rows packed",
]
DENSE = [name for name in LAYOUTS if not any(word in name for word in ("EP2", "tokens", "packed"))]
QWEN = {"architecture": "qwen2", "qkv_bias": True}
GEMMA2 = {
    "architecture": "gemma2",
    "num_query_groups": 1,
    "tied_embeddings": True,
    "activation": "gelu_tanh",
    "zero_centered_norm": True,
    "embedding_scale": True,
    "post_norms": True,
    "attention_softcap": 20.0,
    "logits_softcap": 10.0,
    "query_scale": 8.0,
    "sliding_window": 4,
    "sliding_window_every": 2,
}
EXPERTS = {
    "architecture": "qwen2_moe",
    "qkv_bias": True,
    "num_experts": 4,
    "expert_ffn_hidden_size": 32,
    "shared_expert_ffn_hidden_size": 32,
    "router_softmax_first": True,
}
# Model and the layouts it is run at.
MODELS = {
    "untied": (QWEN, DENSE + TOKENS + PACKED),
    "tied": (
        QWEN | {"tied_embeddings": True},
        [name for name in DENSE if "FP8" not in name and "CP" not in name] + ["TP2 PP2 SP packed"],
    ),
    "qk norm": (
        {"architecture": "qwen3", "qk_norm": True},
        ["TP1", "TP2", "TP2 SP", "TP2 PP2", "TP4"],
    ),
    "gemma2": (
        GEMMA2,
        [
            "TP1",
            "TP2",
            "TP2 SP",
            "PP2 VPP2",
            "TP2 PP2 SP",
            "TP4",
            "TP1 packed",
            "TP2 SP packed",
            "PP2 VPP2 DP2 packed",
            "PP2 VPP2 CP2",
            "CP2 packed",
        ],
    ),
    "experts": (
        EXPERTS,
        [
            "TP1",
            "TP2 SP",
            "PP2 VPP2",
            "DP4",
            "EP2",
            "TP2 SP EP2",
            "PP2 EP2",
            "EP2 tokens",
            "EP2 packed",
            "CP2 EP2",
        ],
    ),
}
# A process keeps the groups of all its layouts, and each has a thread that polls.
CASES_AT_ONCE = 10
CASES = [(model, layout) for model in MODELS for layout in MODELS[model][1]]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every case gives."""
    found = {}
    for world, names in starts():
        folder = tmp_path_factory.mktemp("layouts")
        cases = [
            {
                "parallel": LAYOUTS[layout][1],
                "microbatch": microbatch(LAYOUTS[layout][2]),
                "model": MODELS[model][0],
                "fp8": "hybrid" if "FP8" in layout else "off",
                "weights": str(folder / f"{model} {layout}"),
            }
            for model, layout in names
        ]
        answers = run_ranks(
            "layout_ranks.py", world, folder / "found.json", json.dumps(cases), timeout=600
        )
        for name, case, answer in zip(names, cases, answers, strict=True):
            found[name] = answer | {"folder": case["weights"]}
    return found


def starts():
    """Yield a world size and the cases that its ranks go through, one after another."""
    for world in (1, 2, 4):
        names = [name for name in CASES if LAYOUTS[name[1]][0] == world]
        for first in range(0, len(names), CASES_AT_ONCE):
            yield world, names[first : first + CASES_AT_ONCE]


def microbatch(limit):
    return limit if isinstance(limit, dict) else {"microbatch_size": limit}


def flat(value):
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in flat(value[key])]
    if isinstance(value, list):
        return [x for item in value for x in flat(item)]
    return [value]


def assert_same(found, expected, name):
    """Agree to 1e-5 of the largest number of its kind."""
    scale = max(map(abs, flat(expected)), default=0.0)
    assert flat(found) == pytest.approx(flat(expected), rel=1e-5, abs=1e-5 * scale), name


@pytest.mark.parametrize(("model", "layout"), [case for case in CASES if case[1] != "TP1"])
def test_every_number_is_that_of_one_rank(results, model, layout):
    expected, found = results[model, "TP1"], results[model, layout]
    assert found["ppo"]["greedy"] == expected["ppo"]["greedy"]
    assert found["ppo"]["sampled"] == expected["ppo"]["sampled"]
    if model == "experts":
        assert found["ppo"]["uneven"] == expected["ppo"]["greedy"][:3]
    for job in ("ppo", "reward"):
        for name, value in expected[job].items():
            if name not in ("metrics", "tokens_per_replica"):
                assert_same(found[job][name], value, name)
    for name, value in expected["ppo"]["metrics"].items():
        # Divergences are differences of log-probs, which are of the order of 1.
        assert found["ppo"]["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(("model", "layout"), [case for case in CASES if case[1] != "TP1"])
@pytest.mark.parametrize("role", ["policy", "critic", "reward"])
def test_the_weights_after_two_steps_are_those_of_one_rank(results, model, layout, role):
    found, expected = (
        load_file(f"{results[model, name]['folder']}/{role}/model.safetensors")
        for name in (layout, "TP1")
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("model", MODELS)
def test_the_case_is_not_trivial(results, model):
    ppo = results[model, "TP1"]["ppo"]
    assert ppo["sampled"] != ppo["greedy"]
    assert ppo["metrics"]["policy/grad_norm"] > 0.01
    assert ppo["metrics"]["policy/kl"] != 0
    assert flat(ppo["logprobs_after"]) != pytest.approx(flat(ppo["old_logprobs"]), abs=1e-3)


def test_a_token_budget_balances_the_replicas(results):
    """The same samples, dealt so that the fuller replica has fewer tokens than by their order."""
    for model, layout in (("untied", "DP2"), ("experts", "EP2")):
        by_order, by_tokens = (
            results[model, name]["ppo"]["tokens_per_replica"]
            for name in (layout, f"{layout} tokens")
        )
        assert sum(by_tokens) == sum(by_order)
        assert max(by_tokens) - min(by_tokens) <= 3
        assert max(by_tokens) <= max(by_order)


def test_responses_end_early_in_most_models(results):
    ragged = [
        len({len(r) for r in results[model, "TP1"]["ppo"]["sampled"]}) > 1 for model in MODELS
    ]
    assert sum(ragged) > len(MODELS) / 2
