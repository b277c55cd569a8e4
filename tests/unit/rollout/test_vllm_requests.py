"""Answers of vLLM as it writes them; tests/vllm/ has real ones."""

from types import SimpleNamespace

import pytest

from marlhf_mega.rollout import vllm_requests
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.vllm_requests import EngineResponse, extend

INF = float("inf")


def test_kept_tokens_are_those_that_have_a_probability():
    """Each place has the token itself first, then the 2 * 1 + 8 likeliest: two tie with k = 1."""
    response = EngineResponse(tokens=[], logprobs=[])
    rest = [-INF] * 8
    flat = SimpleNamespace(
        start_indices=[0, 11],
        end_indices=[11, 22],
        token_ids=[7, 7, 3, *range(20, 28), 5, 5, 6, *range(20, 28)],
        logprobs=[-0.7, -0.7, -0.7, *rest, 0.0, 0.0, -INF, *rest],
    )
    output = SimpleNamespace(token_ids=[7, 5], logprobs=flat)
    rule = SamplingRule(temperature=1.0, top_k=1, record_kept=True)
    extend(response, output, rule, StopRule())
    assert response == EngineResponse(tokens=[7, 5], logprobs=[-0.7, 0.0], kept=[[7, 3], [5]])


def test_a_set_of_kept_tokens_that_is_not_whole_ends_the_run():
    rule = SamplingRule(temperature=1.0, top_k=1, record_kept=True)
    with pytest.raises(RuntimeError) as error:
        vllm_requests._kept(list(range(10)), [-2.3] * 10, rule)
    assert str(error.value) == (
        "rollout.top_k=1: at most 9 tokens may be as likely as the k-th or likelier, as "
        "rollout.engine=vllm keeps them all; there are more. Use another rollout.top_k, or "
        "rollout.engine=own."
    )
    # Of a vocabulary of nine no more can be asked for.
    assert vllm_requests._kept(list(range(9)), [-2.2] * 9, rule) == list(range(9))
