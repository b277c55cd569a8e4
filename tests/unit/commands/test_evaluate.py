"""Held-out results on more replicas than there are prompts, and rows that are answered anew."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.cli import main
from marlhf_mega.commands import generate
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience import evaluation
from marlhf_mega.rollout.types import Rollout


class Tokens:
    end_ids = (2,)

    def decode(self, ids):
        return "x" * len(ids)

    def response_text(self, ids):
        return self.decode(ids)

    def offsets(self, ids):
        return [(i, i + 1) for i in range(len(ids))]

    def end_text(self, ids):
        return None


class Echo:
    """Answers a prompt with as many tokens as it has."""

    mesh = SimpleNamespace(dp_size=1)

    def generate(self, prompts, sample_indices, _):
        return Rollout(
            prompts=list(prompts),
            responses=[list(p) for p in prompts],
            finished=[len(p) < 3 for p in prompts],
            sample_indices=list(sample_indices),
            logprobs=torch.zeros(len(prompts), 1),
        )


def mesh_of(dp_rank, dp_size):
    return SimpleNamespace(
        dp_rank=dp_rank,
        dp_size=dp_size,
        pp_size=1,
        ep_size=1,
        num_chunks=1,
        sequence_multiple=1,
        context_multiple=1,
        device=torch.device("cpu"),
        is_replica_leader=True,
        groups=SimpleNamespace(dp=SimpleNamespace(size=lambda: dp_size)),
    )


class Numbered(Echo):
    """Answers a prompt with its tokens and the number of the sample, but every third with both."""

    def generate(self, prompts, sample_indices, options):
        rollout = super().generate(prompts, sample_indices, options)
        both = zip(rollout.responses, sample_indices, strict=True)
        responses = [[*r, 90 + i] if i % 3 else [*r, 99, 99] for r, i in both]
        return replace(rollout, responses=responses)


def judged_by(monkeypatch, num_replicas, config, generator):
    """Judge two prompts on replicas one after another; the last has what all of them found."""
    parts = []

    class OthersAreMissingError(Exception):
        pass

    def gather(part, group):
        parts.append(part)
        if len(parts) < num_replicas:
            raise OthersAreMissingError
        return parts

    monkeypatch.setattr(evaluation, "gather_objects", gather)
    prompts = [Prompt(prompt_ids=[5] * n, prompt="p", row={"prompt": "p"}) for n in (2, 3)]
    for rank in range(num_replicas):
        evaluator = evaluation.Evaluator(
            config,
            prompts,
            Tokens(),
            None,
            generator,
            mesh_of(rank, num_replicas),
            limit=MicrobatchLimit(sequences=2),
        )
        with nullcontext() if rank + 1 == num_replicas else pytest.raises(OthersAreMissingError):
            judged = evaluator.judge([], None)
    return judged


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_replicas_without_a_prompt_add_nothing(monkeypatch, num_replicas):
    judged = judged_by(monkeypatch, num_replicas, Config(), Echo())
    assert judged.results.metrics["eval/response_tokens"] == 2.5
    assert judged.results.metrics["eval/truncated_fraction"] == 0.5
    assert [sample.response for sample in judged.samples] == ["xx", "xxx"]
    assert not any("distinct" in name for name in judged.results.metrics)


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
def test_several_responses_to_a_prompt_are_one_result_and_their_diversity(
    monkeypatch, num_replicas
):
    """Samples 0 to 2 answer `5 5` with 55XX, 55a, 55b; 3 to 5 `5 5 5` with 555XX, 555c, 555d."""
    config = Config.model_validate({"evaluate": {"samples_per_prompt": 3}})
    judged = judged_by(monkeypatch, num_replicas, config, Numbered())
    assert [len(sample.response) for sample in judged.samples] == [4, 3, 3, 5, 4, 4]
    metrics = judged.results.metrics
    lengths = judged.results.values["eval/response_tokens"]
    assert lengths == pytest.approx([10 / 3, 13 / 3])
    # One token of three answers ends them: 5 and X, 5 and a, 5 and b are four kinds.
    assert judged.results.values["eval/distinct_1_per_input"] == [4 / 10, 4 / 13]
    # 55 5X XX, 55 5a, 55 5b: five kinds of seven; 55 55 5X XX, 55 55 5c, 55 55 5d: five of ten.
    assert judged.results.values["eval/distinct_2_per_input"] == [5 / 7, 5 / 10]
    assert metrics["eval/distinct_1_cross_input"] == 2 / 9  # 55XX and 555XX
    assert metrics["eval/distinct_2_per_input_stderr"] > 0


def test_an_answer_does_not_keep_the_reward_of_the_answer_before():
    """The file may be one that was answered and scored already."""
    row = {"prompt": "p", "response": "old", "reward": 1.0, "id": 7}
    inputs = SimpleNamespace(
        config=Config(),
        validation=[Prompt(prompt_ids=[5, 5], prompt="p", row=row)],
        tokenizer=Tokens(),
    )
    scorer = SimpleNamespace(terms=[])
    rows = generate.answer(inputs, range(1), Echo(), scorer, mesh_of(0, 1))
    assert rows == [{"prompt": "p", "response": "xx", "id": 7, "finished": True}]


def test_held_out_responses_without_a_score_are_counted_in_a_warning(job_files, tmp_path, caplog):
    """Also where none is left, so that no mean is shown."""
    arguments = [
        "evaluate",
        f"run.dir={tmp_path}",
        f"data.validation_path={job_files}/prompts.jsonl",
    ]
    arguments += [f"tokenizer.path={job_files / 'tok'}", "evaluate.gold=json:dumps"]
    assert main([*arguments, "evaluate.num_prompts=2", "rollout.max_response_tokens=4"]) == 0
    assert "2 of 2 held-out responses have no gold score: " in caplog.text
    assert "TypeError" in caplog.text


def test_best_of_n_judges_the_answer_with_the_highest_score(job_files, tmp_path, monkeypatch):
    """The score counts the letters e, the gold rule the letters; both are in samples.jsonl."""
    (tmp_path / "best_rules.py").write_text(
        "def letters_e(prompt, response):\n    return response.count('e')\n"
        "def letters(prompt, response):\n    return len(response)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = [
        "evaluate",
        f"run.dir={tmp_path / 'run'}",
        f"data.validation_path={job_files}/prompts.jsonl",
        f"tokenizer.path={job_files / 'tok'}",
        "reward.source=best_rules:letters_e",
        "evaluate.gold=best_rules:letters",
        "evaluate.num_prompts=4",
        "evaluate.samples_per_prompt=3",
        "evaluate.best_of_n=true",
        "rollout.max_response_tokens=12",
        "logging.samples=12",
    ]
    assert main(arguments) == 0
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    groups = [answers[i : i + 3] for i in range(0, 12, 3)]
    best = [max(group, key=lambda answer: answer["score"]) for group in groups]
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["eval/score_mean"] == sum(a["score"] for a in best) / 4
    assert found["eval/gold_mean"] == sum(a["gold"] for a in best) / 4
    assert len({a["score"] for a in answers}) > 1
