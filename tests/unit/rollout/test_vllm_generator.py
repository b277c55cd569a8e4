"""Requests and rollouts around an engine that repeats itself; tests/vllm/ has the real one."""

from types import SimpleNamespace

import torch

from marlhf_mega.algorithm.replay_mask import read_mask
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.rollout.vllm_generator import VllmGenerator
from marlhf_mega.rollout.vllm_requests import EngineResponse

MESH = SimpleNamespace(device=torch.device("cpu"))


class Echo:
    """Answers with the prompt, as far as it may, and counts log-probs down."""

    def complete(self, requests, *, rule, stop):
        self.requests, self.rule, self.stop = requests, rule, stop
        found = [request.prompt[: request.max_tokens] for request in requests]
        return [EngineResponse(tokens=t, logprobs=[-1.0 - i for i in range(len(t))]) for t in found]


def options(step=3, limit=8, **rule):
    rule = SamplingRule(**({"temperature": 1.0} | rule))
    return RolloutOptions(rule=rule, max_response_tokens=limit, seed=11, step=step)


def test_answers_become_a_rollout():
    engine, stop = Echo(), StopRule(frozenset({7}))
    generator = VllmGenerator(engine, MESH, stop=stop)
    rollout = generator.generate([[4, 5, 7], [6], [1, 7, 2]], [9, 2, 5], options())
    assert rollout.prompts == rollout.responses == [[4, 5, 7], [6], [1, 7, 2]]
    assert rollout.finished == [True, False, False]
    assert rollout.sample_indices == [9, 2, 5]
    assert rollout.logprobs.tolist() == [[-1, -2, -3], [-1, 0, 0], [-1, -2, -3]]
    assert rollout.full_logprobs is None
    assert rollout.unfiltered_logprobs is rollout.logprobs
    assert engine.stop is stop


def test_every_sample_has_its_limit_and_its_seed():
    """A seed belongs to (seed, step, sample): not to the place of a prompt in a batch."""
    engine = Echo()
    generator = VllmGenerator(engine, MESH, stop=StopRule())

    def requests(indices, step):
        prompts = [[index, 1, 2, 3] for index in indices]
        generator.generate(prompts, indices, options(step=step, limit={5: 2, 6: 3, 1 << 40: 4}))
        return {r.prompt[0]: (r.max_tokens, r.seed) for r in engine.requests}

    found, shuffled, later = (
        requests([5, 6, 1 << 40], 0),
        requests([1 << 40, 5], 0),
        requests([5, 6], 1),
    )
    assert {index: limit for index, (limit, _) in found.items()} == {5: 2, 6: 3, 1 << 40: 4}
    assert shuffled == {index: found[index] for index in shuffled}
    seeds = [seed for part in (found, later) for _, seed in part.values()]
    assert len(set(seeds)) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_log_probs_before_filters_are_unknown_rather_than_wrong():
    generator = VllmGenerator(Echo(), MESH, stop=StopRule())
    assert generator.generate([[1, 2]], [0], options(top_k=2)).full_logprobs.isnan().all()


def test_no_prompts_are_no_rollout():
    rollout = VllmGenerator(Echo(), MESH, stop=StopRule()).generate([], [], options())
    assert rollout.responses == []
    assert rollout.logprobs.shape == (0, 1)


def test_kept_tokens_are_rows_of_a_mask():
    engine = Echo()
    complete = engine.complete

    def filtered(requests, *, rule, stop):
        found = complete(requests, rule=rule, stop=stop)
        for response in found:
            response.kept = [[token, 9] for token in response.tokens]
        return found

    engine.complete = filtered
    generator = VllmGenerator(engine, MESH, stop=StopRule())
    rollout = generator.generate([[4, 5], [6]], [0, 1], options(top_k=2, record_kept=True))
    assert rollout.kept.shape == (2, 2, 2 * 2 + 8)
    found = [[read_mask(row[None], start=0, count=12)[0] for row in rows] for rows in rollout.kept]
    ids = [[mask.nonzero().flatten().tolist() for mask in rows] for rows in found]
    assert ids == [[[4, 9], [5, 9]], [[6, 9], []]]
