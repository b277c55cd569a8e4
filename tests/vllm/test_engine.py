"""A real vLLM engine against our decoder and a training pass: dense, tied and expert models."""

import json
from itertools import chain

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.vllm.installed import needs_vllm

pytestmark = needs_vllm

BASE = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 32,  # the smallest that it takes on CPUs
    "ffn_hidden_size": 96,
    "vocab_size": 50,
    "init_std": 0.1,
}
TP2_PP2 = {"tensor_size": 2, "pipeline_size": 2}
GEMMA = {
    "architecture": "gemma2",
    "activation": "gelu_tanh",
    "tied_embeddings": True,
    "embedding_scale": True,
    "zero_centered_norm": True,
    "post_norms": True,
    "attention_softcap": 50.0,
    "logits_softcap": 30.0,
    "query_scale": 32.0,
    "sliding_window": 8,
    "sliding_window_every": 2,
}
EXPERTS = {"architecture": "mixtral", "num_experts": 4, "experts_per_token": 2}
CASES = {
    "llama": ({"architecture": "llama"}, TP2_PP2, {"tensor_size": 2}),
    "tied qwen3": (
        {"architecture": "qwen3", "qk_norm": True, "tied_embeddings": True},
        TP2_PP2,
        {"tensor_size": 1},
    ),
    "gemma2": (GEMMA, TP2_PP2, {"tensor_size": 2}),
    "mixtral": (EXPERTS, {"pipeline_size": 2, "expert_size": 2}, {"tensor_size": 2}),
    "adapters": ({"architecture": "llama", "lora": {"rank": 4}}, TP2_PP2, {"tensor_size": 2}),
}
ROUNDED = ({"architecture": "llama"}, TP2_PP2, {"tensor_size": 2})
"""In bfloat16, where the two decoders round differently."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run every case in one start of 4 ranks; each has an engine of its own."""
    cases = [
        {"model": BASE | model, "parallel": parallel, "rollout": rollout, "draws": not number}
        for number, (model, parallel, rollout) in enumerate([*CASES.values(), ROUNDED])
    ]
    cases[-1]["dtype"] = "bfloat16"
    out = tmp_path_factory.mktemp("vllm") / "4.json"
    found = run_ranks("../vllm/engine_ranks.py", 4, out, json.dumps(cases), timeout=900)
    return dict(zip([*CASES, "bfloat16"], found, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_equal_those_of_our_decoder_before_and_after_updates(results, name):
    states = results[name]["states"]
    for state in states:
        assert state["greedy"] == state["greedy_own"]
        assert state["finished"] == state["finished_own"]
    answers = [json.dumps(state["greedy"]) for state in states]
    assert len(set(answers)) == len(states) == 3


def test_draws_follow_the_distribution(results):
    """Chi-squared over the tokens of which five draws or more are to be expected."""
    found = results["llama"]["drawn"]
    counts, probabilities = (torch.tensor(found[name]).double() for name in sorted(found))
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    expected = probabilities * counts.sum()
    often = expected >= 5
    freedom = int(often.sum())
    assert freedom > 10
    squares = ((counts - expected) ** 2 / expected)[often].sum()
    assert abs(squares - freedom) < 3 * (2 * freedom) ** 0.5


def test_in_bfloat16_they_differ_by_rounding_alone(results):
    """A response goes another way where two tokens are about as likely: few do.

    Logits that are equal are common. All that tie with the k-th are kept, and recorded.
    """
    states = results["bfloat16"]["states"]
    equal = [a == b for s in states for a, b in zip(s["greedy"], s["greedy_own"], strict=True)]
    assert sum(equal) >= len(equal) * 2 / 3
    assert max(state["kept_gap"] for state in states) < 6e-2
    counts = {n for state in states for row in state["kept"][0] for n in row}
    assert min(counts) == 6 < max(counts)
    assert 1e-5 < max(state["gap"] for state in states) < 6e-2


@pytest.mark.parametrize("name", CASES)
def test_logprobs_equal_those_of_a_training_pass(results, name):
    assert max(state["gap"] for state in results[name]["states"]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_training_renormalises_over_the_tokens_that_filters_kept(results, name):
    """A token more or less would change log-probs by its share of the probability."""
    for state in results[name]["states"]:
        some, fewer = ([*chain.from_iterable(counts)] for counts in state["kept"])
        assert set(some) == {6}
        assert 0 < min(fewer) < max(fewer) <= 6
        assert state["kept_gap"] < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_seed_repeats_its_samples(results, name):
    found = results[name]
    assert found["again"] == found["states"][-1]["sampled"]
    assert found["again"] != found["states"][-1]["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_texts_and_limits_end_responses_as_if_cut_by_hand(results, name):
    found = results[name]["ended"]
    whole, text = found["whole"], found["text"]
    ends = [next((i for i in range(3, 13) if r[i - 3 : i] == text), 12) for r in whole]
    assert found["at_text"] == [r[:end] for r, end in zip(whole, ends, strict=True)]
    assert found["finished"] == [
        r[end - 3 : end] == text for r, end in zip(whole, ends, strict=True)
    ]
    assert found["finished"][2]
    assert found["text_gap"] < 1e-5
    assert found["limited"] == [r[: 3 + i] for i, r in enumerate(whole)]


@pytest.mark.parametrize("name", CASES)
def test_of_one_token_that_is_kept_there_is_no_choice(results, name):
    found = results[name]["ended"]
    assert found["likeliest"] == found["greedy"]


@pytest.mark.parametrize("name", CASES)
def test_the_process_is_left_as_it_was(results, name):
    assert results[name]["untouched"]


@pytest.mark.parametrize("name", CASES)
def test_weights_travel_to_every_rank_that_lacks_them(results, name):
    """Each of 4 ranks gets the whole model, but for the shards that it holds."""
    found = results[name]
    assert found["seconds"] > 0
    assert 0 < found["bytes"] < 4 * found["whole_bytes"]
