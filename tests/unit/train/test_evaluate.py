"""Held-out results on more replicas than there are prompts, and rows that are answered anew."""

from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.rollout.types import Rollout
from marlhf_mega.train import evaluate, generate


class Tokens:
    def decode(self, ids):
        return "x" * len(ids)

    def offsets(self, ids):
        return [(i, i + 1) for i in range(len(ids))]


class Echo:
    """Answers a prompt with as many tokens as it has."""

    mesh = SimpleNamespace(dp_size=1)

    def generate(self, prompts, sample_indices, **_):
        return Rollout(
            prompts=list(prompts),
            responses=[list(p) for p in prompts],
            finished=[len(p) < 3 for p in prompts],
            sample_indices=list(sample_indices),
            logprobs=torch.zeros(len(prompts), 1),
        )


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_replicas_without_a_prompt_add_nothing(monkeypatch, num_replicas):
    parts = []

    def gather(part, mesh):
        parts.append(part)
        return list(parts)

    monkeypatch.setattr(evaluate, "gather_objects_over_data", gather)
    prompts = [Prompt(prompt_ids=[5] * n, prompt="p", row={"prompt": "p"}) for n in (2, 3)]
    for rank in range(num_replicas):
        mesh = SimpleNamespace(dp_rank=rank, dp_size=num_replicas, is_replica_leader=True)
        evaluator = evaluate.Evaluator(Config(), prompts, Tokens(), None, Echo(), mesh)
        judged = evaluator.judge([], None)
    assert judged.metrics["eval/response_tokens"] == 2.5
    assert judged.metrics["eval/truncated_fraction"] == 0.5
    assert [sample.response for sample in judged.samples] == ["xx", "xxx"]


def test_an_answer_does_not_keep_the_reward_of_the_answer_before():
    """The file may be one that was answered and scored already."""
    row = {"prompt": "p", "response": "old", "reward": 1.0, "id": 7}
    inputs = SimpleNamespace(
        config=Config(),
        validation=[Prompt(prompt_ids=[5, 5], prompt="p", row=row)],
        tokenizer=Tokens(),
    )
    mesh, scorer = SimpleNamespace(dp_rank=0, dp_size=1), SimpleNamespace(terms=[])
    rows = generate.answer(inputs, range(1), Echo(), scorer, mesh)
    assert rows == [{"prompt": "p", "response": "xx", "id": 7, "finished": True}]
