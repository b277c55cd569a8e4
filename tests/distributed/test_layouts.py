"""The result does not depend on the layout: ppo, reward, offline and rollouts against one rank."""

import json
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from marlhf_mega.algorithm.choices import Aggregation, Estimator, Objective, OfflineAlgorithm
from tests.distributed.ranks import run_ranks

TP2, PP2, CP2 = {"tensor_size": 2}, {"pipeline_size": 2}, {"context_size": 2}
SP, VPP2, EP2 = {"sequence_parallel": True}, {"virtual_pipeline_size": 2}, {"expert_size": 2}
BUDGET = {"microbatch_size": 2, "microbatch_tokens": 40}
PACKING = BUDGET | {"packing": True}
# World size, degrees, microbatch size or keys of ppo. Any two of TP, SP, PP, CP, DP and EP meet.
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
    "TP2 SP DP2": (4, TP2 | SP, 2),
    "TP4": (4, {"tensor_size": 4}, 8),
    "PP4": (4, {"pipeline_size": 4}, 1),
    "DP4": (4, {}, 2),
    "PP2 VPP2 DP2": (4, PP2 | VPP2, 2),
    # Without Transformer Engine only the rows are as FP8 needs them, 16 on every rank.
    "TP1 FP8 rows": (1, {}, 4),
    "TP2 PP2 SP FP8 rows": (4, TP2 | PP2 | SP, 4),
    "EP2": (2, EP2, 2),
    "TP2 SP EP2": (2, TP2 | SP | EP2, 4),
    "PP2 EP2": (4, PP2 | EP2, 2),
    "CP4": (4, {"context_size": 4}, 8),
    "TP2 CP2 SP": (4, TP2 | CP2 | SP, 4),
    "PP2 VPP2 CP2": (4, PP2 | VPP2 | CP2, 2),
    "CP2 EP2": (2, CP2 | EP2, 4),
    "TP2 SP tokens": (2, TP2 | SP, BUDGET | {"scoring_microbatch_factor": 2}),
    "DP2 tokens": (2, {}, BUDGET),
    "EP2 tokens": (2, EP2, BUDGET),
    "PP2 VPP2 DP2 tokens": (4, PP2 | VPP2, BUDGET),
    "CP2 DP2 tokens": (4, CP2, BUDGET),
    "TP1 packed": (1, {}, PACKING),
    "TP2 SP packed": (2, TP2 | SP, PACKING),
    "DP2 packed": (2, {}, {"microbatch_size": 2, "packing": True}),
    "EP2 packed": (2, EP2, PACKING),
    "CP2 packed": (2, CP2, PACKING | {"microbatch_tokens": 44}),
    "TP2 CP2 SP FP8 rows packed": (4, TP2 | CP2 | SP, {"microbatch_size": 3, "packing": True}),
    "PP2 VPP2 DP2 packed": (4, PP2 | VPP2, PACKING),
    "TP2 PP2 SP FP8 rows packed": (4, TP2 | PP2 | SP, PACKING),
    "TP2 PP2 DP2 packed": (8, TP2 | PP2, {"microbatch_size": 2, "packing": True}),
}
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
    "untied": (
        QWEN,
        [
            "TP1",
            "TP1 microbatch 1",
            "TP1 FP8 rows",
            "PP2",
            "DP2",
            "TP2 SP tokens",
            "DP2 tokens",
            "TP2 SP packed",
            "DP2 packed",
            "CP2 packed",
            "CP4",
            "TP2 SP DP2",
            "TP2 CP2 SP",
            "TP2 PP2 SP FP8 rows",
            "CP2 DP2 tokens",
            "PP2 VPP2 DP2 tokens",
            "PP2 VPP2 DP2 packed",
            "TP2 CP2 SP FP8 rows packed",
            "TP2 PP2 SP FP8 rows packed",
            "TP2 PP2 DP2 packed",
        ],
    ),
    "tied": (
        QWEN | {"tied_embeddings": True},
        ["TP1", "TP2", "PP2", "PP2 VPP2", "TP2 PP2 SP", "PP4", "PP2 VPP2 DP2"],
    ),
    "qk norm": (
        {"architecture": "qwen3", "qk_norm": True},
        ["TP1", "TP2 SP", "TP2 PP2", "TP4"],
    ),
    "gemma2": (
        GEMMA2,
        [
            "TP1",
            "TP1 packed",
            "TP2 SP",
            "TP2 SP packed",
            "CP2 packed",
            "TP4",
            "TP2 PP2 SP",
            "PP2 VPP2 CP2",
            "PP2 VPP2 DP2 packed",
        ],
    ),
    "experts": (
        EXPERTS,
        [
            "TP1",
            "TP2 SP",
            "PP2 VPP2",
            "EP2",
            "TP2 SP EP2",
            "CP2 EP2",
            "EP2 tokens",
            "EP2 packed",
            "DP4",
            "PP2 EP2",
        ],
    ),
}
# Samples drawn with top-k and top-p; the policy is renormalised over what they kept.
FILTERS = {
    "filtered": {"top_k": 5, "top_p": 0.8, "temperature": 0.7},
    # Ranks that share the vocabulary sort only their own columns.
    "nucleus": {"top_p": 0.8, "temperature": 0.7},
    # Which tokens is said by a model beside the policy.
    "masked": {"top_p": 0.8, "temperature": 0.7, "mask_interval": 1, "mask_min_tokens": 3},
}
MODELS["filtered"] = (QWEN, ["TP1", "TP2 PP2", "CP2 packed"])
MODELS["nucleus"] = (QWEN, ["TP1", "TP2 PP2"])
MODELS["masked"] = (GEMMA2, ["TP1", "TP2 PP2"])
LORA = {"rank": 4, "alpha": 32, "dropout": 0.3}
MODELS["adapters"] = (
    QWEN | {"lora": LORA},
    ["TP1", "TP4", "PP2 VPP2 DP2 packed", "TP2 PP2 SP FP8 rows packed", "TP2 CP2 SP"],
)
ATTENTION = {"targets": ["q_proj", "v_proj", "o_proj"]}
MODELS["adapters experts"] = (EXPERTS | {"lora": LORA | ATTENTION}, ["TP1", "TP2 SP EP2"])
# Where every estimator, objective and loss is tried: padded on one rank, packed on eight.
METHOD_CASES = [("untied", name) for name in ("TP1", "TP2 PP2 DP2 packed")]
# Whose cases also have a second head, latents and prompt values: small layers on the states of any
# architecture, with experts and adapters among what they train.
WITH_HEADS = ["untied", "experts", "adapters", "adapters experts"]
# A process keeps the groups of all its layouts, and each has a thread that polls. Neighbours of one
# layout share them.
CASES_AT_ONCE = 8
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
                "rollout": FILTERS.get(model, {}),
                "methods": (model, layout) in METHOD_CASES,
                "heads": model in WITH_HEADS,
                "fp8": "hybrid" if "FP8" in layout else "off",
                "weights": str(folder / f"{model} {layout}"),
            }
            for model, layout in names
        ]
        answers = run_ranks(
            "layouts_ranks.py", world, folder / "found.json", json.dumps(cases), timeout=600
        )
        for name, case, answer in zip(names, cases, answers, strict=True):
            found[name] = answer | {"folder": case["weights"]}
    return found


def starts():
    """Yield a world size and the cases that its ranks go through, one after another."""
    for world in (1, 2, 4, 8):
        names = [name for name in CASES if LAYOUTS[name[1]][0] == world]
        names.sort(key=lambda name: sorted(LAYOUTS[name[1]][1].items()))
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


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_the_ratio_of_the_first_update_is_one(results, model, layout):
    found = results[model, layout]["ppo"]
    assert found["first_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert len(found["kept"]) == (8 if model in FILTERS else 0)


@pytest.mark.parametrize("layout", MODELS["experts"][1])
def test_replayed_tokens_go_to_the_samplers_experts(results, layout):
    """Routers that choose the worst experts: with replay log-probs are the sampler's."""
    found = results["experts", layout]["ppo"]
    replayed, free = found["routing_gaps"]
    assert replayed < 1e-5
    assert free > 0.1
    # Of four experts the worst two are never the best two.
    assert found["routing_changed"] == 1.0


@pytest.mark.parametrize(("model", "layout"), [case for case in CASES if case[1] != "TP1"])
def test_every_number_is_that_of_one_rank(results, model, layout):
    expected, found = results[model, "TP1"], results[model, layout]
    assert found["ppo"]["greedy"] == expected["ppo"]["greedy"]
    assert found["ppo"]["sampled"] == expected["ppo"]["sampled"]
    if model == "experts":
        assert found["ppo"]["uneven"] == expected["ppo"]["greedy"][:3]
    for job in ("ppo", "reward", "two_heads", "latents", "offline"):
        for name, value in expected[job].items():
            if name not in ("metrics", "methods", "algorithms", "tokens_per_replica"):
                assert_same(found[job][name], value, name)
    for name, value in expected["ppo"]["metrics"].items():
        # Divergences are differences of log-probs, which are of the order of 1.
        assert found["ppo"]["metrics"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(("model", "layout"), [case for case in CASES if case[1] != "TP1"])
def test_the_weights_after_two_steps_are_those_of_one_rank(results, model, layout):
    heads = ["two_heads"] if model in WITH_HEADS else []
    for role in ("policy", "critic", "reward", *heads):
        found, expected = (
            load_file(f"{results[model, name]['folder']}/{role}/model.safetensors")
            for name in (layout, "TP1")
        )
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6), (role, name)


@pytest.mark.parametrize("case", METHOD_CASES[1:], ids=lambda case: case[1])
def test_every_estimator_and_objective_gives_the_numbers_of_one_rank(results, case):
    expected, found = (results[key]["ppo"]["methods"] for key in (METHOD_CASES[0], case))
    assert found.keys() == expected.keys()
    for method, numbers in expected.items():
        assert_same(found[method]["advantages"], numbers["advantages"], method)
        assert found[method]["metrics"].keys() == numbers["metrics"].keys()
        for name, value in numbers["metrics"].items():
            close = pytest.approx(value, rel=1e-4, abs=1e-5)
            assert found[method]["metrics"][name] == close, (method, name)


def test_every_offline_loss_is_that_of_one_rank(results):
    expected, found = (results[key]["offline"]["algorithms"] for key in METHOD_CASES)
    assert [*expected] == [*get_args(OfflineAlgorithm)]
    for algorithm, numbers in expected.items():
        assert found[algorithm] == pytest.approx(numbers, rel=1e-4), algorithm
    assert len({numbers["loss"] for numbers in expected.values()}) == len(expected)


def test_every_choice_is_tried_at_a_layout_of_three_kinds(results):
    """The case itself has the default of each."""
    tried = [each["method"] for each in results[METHOD_CASES[0]]["ppo"]["methods"].values()]
    for choices, found in zip(
        (Estimator, Objective, Aggregation), zip(*tried, strict=True), strict=True
    ):
        default, *others = get_args(choices)
        assert {default, *found} == {default, *others}


@pytest.mark.parametrize("case", METHOD_CASES[1:], ids=lambda case: case[1])
def test_every_preference_loss_gives_the_numbers_of_one_rank(results, case):
    expected, found = (results[key]["preference"] for key in (METHOD_CASES[0], case))
    assert len({str(numbers[0]) for numbers in expected.values()}) == len(expected)
    for loss, numbers in expected.items():
        assert numbers[1] == 8
        assert numbers[-1] > 1e-3
        assert_same(found[loss], numbers, loss)


def test_estimators_differ_and_none_teaches_nothing(results):
    found = results[METHOD_CASES[0]]["ppo"]["methods"]
    assert all(each["metrics"]["policy/grad_norm"] > 0.01 for each in found.values())
    assert len({str(each["advantages"]) for each in found.values()}) == len(found)


@pytest.mark.parametrize("model", MODELS)
def test_the_case_is_not_trivial(results, model):
    ppo = results[model, "TP1"]["ppo"]
    assert ppo["sampled"] != ppo["greedy"]
    assert ppo["metrics"]["policy/grad_norm"] > 0.01
    assert ppo["metrics"]["policy/kl"] != 0
    if model in WITH_HEADS:
        assert len(set(results[model, "TP1"]["offline"]["values"])) == 8
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
