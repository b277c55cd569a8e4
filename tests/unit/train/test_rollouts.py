"""What a resumed run makes of samples that wait for their step, with ranks that echo."""

import json
from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.rollout.remote import Answer
from marlhf_mega.rollout.types import Rollout
from marlhf_mega.train import rollouts
from marlhf_mega.train.rollouts import Rollouts, SeparateRollouts


def echo(prompts, indices):
    """Answer every prompt with itself."""
    return Rollout(
        prompts=prompts,
        responses=prompts,
        finished=[True] * len(prompts),
        sample_indices=list(indices),
        logprobs=torch.zeros(len(prompts), 1),
    )


class Remote:
    def ask(self, request):
        self.prompts = request.prompts

    def answer(self):
        return Answer(parts=[echo(self.prompts, range(len(self.prompts)))], seconds=0.0)


def connect(self, policy):
    self.generator, self._mover, self._remote = None, None, Remote()
    self._rows = self._answer = None


def answer(generator, prompts, indices, config, *, step):
    return echo(prompts, indices)


@pytest.fixture
def make(monkeypatch):
    monkeypatch.setattr(Rollouts, "_connect", connect)
    monkeypatch.setattr(SeparateRollouts, "_connect", connect)
    monkeypatch.setattr(rollouts, "generate", answer)

    def build(kind, **settings):
        size = settings["batch_size"]
        inputs = SimpleNamespace(
            config=Config.model_validate({"rollout": settings, "ppo": {"minibatch_size": size}}),
            train=[Prompt(prompt_ids=[i], prompt="", row={}) for i in range(40)],
            tokenizer=SimpleNamespace(eos_id=0),
            data_hash="",
        )
        mesh = SimpleNamespace(dp_size=1, dp_rank=0, device=torch.device("cpu"))
        return kind(inputs, mesh, [], num_steps=9)

    return build


STALE = {"ranks": 1, "staleness": 1}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SeparateRollouts, {"batch_size": 4, **STALE}),
        (SeparateRollouts, {"batch_size": 8, **STALE}),
        (SeparateRollouts, {"batch_size": 2, **STALE}),
        (SeparateRollouts, {"batch_size": 4, "samples_per_prompt": 2, **STALE}),
        (SeparateRollouts, {"batch_size": 4, "ranks": 1}),
        (Rollouts, {"batch_size": 4}),
    ],
)
def test_no_prompt_is_left_out_after_a_resume_whatever_has_changed(make, kind, settings):
    before = make(SeparateRollouts, batch_size=4, **STALE)
    _, trained = before.next(0)
    before.settle()
    state = json.loads(json.dumps(before.state_dict()))
    after = make(kind, **settings)
    after.load_state_dict(state)
    seen = [ids for (ids,) in trained.prompts]
    often = settings.get("samples_per_prompt", 1)
    for step in (1, 2):
        prompts, rollout = after.next(step)
        assert len(rollout.responses) == settings["batch_size"]
        assert [p.prompt_ids for p in prompts] == rollout.prompts == rollout.responses
        seen += [ids for (ids,) in rollout.prompts[::often]]
    order = make(Rollouts, batch_size=len(seen))
    assert seen == [ids for (ids,) in order.next(0)[1].prompts]
