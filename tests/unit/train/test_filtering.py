"""Which prompts replace which, with a transport that echoes and scores that are given."""

from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.stream import SourcePart
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.rewards.scores import Scores
from marlhf_mega.rollout.transport import Answer
from marlhf_mega.rollout.types import Rollout
from marlhf_mega.train.filtering import RolloutFilter
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.rollouts import Rollouts


class EchoTransport:
    """Answers every prompt with itself."""

    num_ranks = 1

    def ask(self, request):
        self.request = request

    def answer(self):
        prompts, first = self.request.prompts, self.request.first
        rollout = Rollout(
            prompts=prompts,
            responses=prompts,
            finished=[True] * len(prompts),
            sample_indices=list(range(first, first + len(prompts))),
            logprobs=torch.tensor(prompts, dtype=torch.float32),
        )
        return Answer(parts=[rollout], seconds=2.0)


@pytest.fixture(scope="module")
def mesh():
    yield create_mesh(Config().parallel)
    destroy_mesh()


def make(mesh, scores, entered, **settings):
    """Return a filter and its rollouts; `scores` maps a prompt to those of its two responses."""
    rollout = {"batch_size": 6, "samples_per_prompt": 2, "filter": "dynamic"} | settings
    config = Config.model_validate(
        {"rollout": rollout, "ppo": {"minibatch_size": 6}, "data": {"shuffle": False}}
    )
    inputs = Inputs(
        config=config,
        tokenizer=None,
        tokenizer_path=None,
        train=[Prompt(prompt_ids=[i], prompt=str(i), row={}) for i in range(40)],
        parts=[SourcePart(40)],
        validation=[],
        data_hash="",
    )
    rollouts = Rollouts(inputs, EchoTransport(), mesh, num_steps=9)

    def score(rollout, rows):
        assert [row["prompt"] for row in rows] == [str(ids[0]) for ids in rollout.prompts]
        found = [scores(int(row["prompt"]))[i % 2] for i, row in enumerate(rows)]
        valid = torch.tensor([value is not None for value in found])
        return Scores(torch.tensor([value or 0.0 for value in found]), valid, [])

    watchdog = SimpleNamespace(enter=entered.append)
    return RolloutFilter(config, rollouts, score, mesh, watchdog), rollouts


def choose(chosen, rollouts, step=0):
    prompts, rollout, scores = chosen.choose(step, *rollouts.next(step))
    assert [prompt.prompt_ids for prompt in prompts] == rollout.prompts == rollout.responses
    assert rollout.logprobs[:, 0].tolist() == [ids[0] for ids in rollout.prompts]
    assert rollout.sample_indices == [*range(6)]
    return [ids[0] for ids in rollout.prompts[::2]], scores


def test_a_prompt_whose_responses_score_alike_gives_its_place_to_the_next_of_the_data(mesh):
    """Prompt 3 replaces 1; its responses score alike too, and 4 replaces it."""
    entered = []
    chosen, rollouts = make(mesh, lambda i: (1.0, 1.0) if i in (1, 3) else (0.0, i + 1.0), entered)
    found, scores = choose(chosen, rollouts)
    assert found == [0, 4, 2]
    assert scores.scores.tolist() == [0, 1, 0, 5, 0, 3]
    assert rollouts.state_dict()["stream"]["num_consumed"] == 5
    assert entered == ["rollout"] * 2
    assert rollouts.generation_seconds == 3 * 2.0
    assert chosen.own_lengths == ([1] * 10, [1] * 10)
    assert chosen.metrics == {
        "rollout/kept_fraction": 6 / 10,
        "rollout/distinct_samples": 6.0,
        "rollout/generation_tries": 3.0,
        "rollout/unfiltered_score": pytest.approx((1 + 2 + 3 + 2 + 5) / 10),
    }
    assert choose(chosen, rollouts, 1)[0] == [5, 6, 7]
    assert chosen.metrics["rollout/generation_tries"] == 1


def test_after_the_last_try_prompts_are_taken_as_they_are(mesh):
    chosen, rollouts = make(mesh, lambda _: (1.0, None), [], filter_tries=2)
    found, scores = choose(chosen, rollouts)
    assert found == [3, 4, 5]
    assert scores.valid.tolist() == [True, False] * 3
    assert chosen.metrics["rollout/generation_tries"] == 2


def test_nothing_is_asked_for_if_all_prompts_have_unlike_scores(mesh):
    chosen, rollouts = make(mesh, lambda i: (0.0, i + 1.0), [])
    assert choose(chosen, rollouts)[0] == [0, 1, 2]
    assert rollouts.state_dict()["stream"]["num_consumed"] == 3


def test_too_many_responses_without_a_score_stop_the_run_whatever_a_filter_leaves(mesh):
    """Of a few new prompts all may fail; what counts is the step."""
    few, rollouts = make(
        mesh, lambda i: (1.0, 1.0 + i % 2) if i < 3 else (None, None), [], filter_tries=2
    )
    assert choose(few, rollouts)[0] == [3, 1, 4]
    none, rollouts = make(mesh, lambda i: (1.0, 2.0) if i == 0 else (None, None), [])
    with pytest.raises(RuntimeError, match=r"^reward\.max_invalid_fraction=0\.5: "):
        choose(none, rollouts)
