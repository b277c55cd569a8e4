"""Which samples a step gets, in order, also after a resume; with a transport that echoes."""

import json
from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.stream import SourcePart
from marlhf_mega.resilience.preemption import EarlyEndError
from marlhf_mega.rollout.transport import Answer, End
from marlhf_mega.rollout.types import Rollout
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.rollouts import Rollouts


class EchoTransport:
    """Answers every prompt with itself, and notes what it was called for."""

    num_ranks = 1

    def __init__(self):
        self.calls = []

    def ask(self, request):
        self.calls.append(("ask", request.step))
        self.prompts = request.prompts

    def answer(self):
        self.calls.append(("answer",))
        rollout = Rollout(
            prompts=self.prompts,
            responses=self.prompts,
            finished=[True] * len(self.prompts),
            sample_indices=list(range(len(self.prompts))),
            logprobs=torch.zeros(len(self.prompts), 1),
        )
        return Answer(parts=[rollout], seconds=2.0)

    def end(self, end):
        self.calls.append(end)

    def metrics(self):
        return {}


def make(*, num_steps=9, transport=None, **settings):
    size = settings["batch_size"]
    config = Config.model_validate({"rollout": settings, "ppo": {"minibatch_size": size}})
    prompts = [Prompt(prompt_ids=[i], prompt="", row={}) for i in range(40)]
    mesh = SimpleNamespace(dp_size=1, dp_rank=0, device=torch.device("cpu"))
    transport = transport or EchoTransport()
    inputs = Inputs(
        config=config,
        tokenizer=None,
        tokenizer_path=None,
        train=prompts,
        parts=[SourcePart(len(prompts))],
        validation=[],
        data_hash="",
    )
    return Rollouts(inputs, transport, mesh, num_steps=num_steps)


STALE = {"ranks": 1, "staleness": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 4, **STALE},
        {"batch_size": 8, **STALE},
        {"batch_size": 2, **STALE},
        {"batch_size": 4, "samples_per_prompt": 2, **STALE},
        {"batch_size": 4, "ranks": 1},
        {"batch_size": 4},
    ],
)
def test_no_prompt_is_left_out_after_a_resume_whatever_has_changed(settings):
    before = make(batch_size=4, **STALE)
    _, trained = before.next(0)
    before.wait()
    state = json.loads(json.dumps(before.state_dict()))
    after = make(**settings)
    after.load_state_dict(state)
    seen = [ids for (ids,) in trained.prompts]
    often = settings.get("samples_per_prompt", 1)
    for step in (1, 2):
        prompts, rollout = after.next(step)
        assert len(rollout.responses) == settings["batch_size"]
        assert [p.prompt_ids for p in prompts] == rollout.prompts == rollout.responses
        seen += [ids for (ids,) in rollout.prompts[::often]]
        assert rollout.prompts == [p for p in rollout.prompts[::often] for _ in range(often)]
    order = make(batch_size=len(seen))
    assert seen == [ids for (ids,) in order.next(0)[1].prompts]


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({}, [("ask", 0), ("answer",), ("ask", 1), ("answer",)]),
        # One step ahead, and nothing beyond the last step.
        (STALE, [("ask", 0), ("answer",), ("ask", 1), ("answer",)]),
    ],
)
def test_as_many_samples_are_asked_for_as_are_trained_on(settings, calls):
    transport = EchoTransport()
    rollouts = make(num_steps=2, transport=transport, batch_size=4, **settings)
    rollouts.next(0)
    assert (transport.calls[-1] == ("ask", 1)) == (settings == STALE)
    rollouts.next(1)
    assert transport.calls == calls
    assert rollouts.generation_seconds == 2.0


def test_other_ranks_hear_the_end_and_its_code_but_not_of_a_failure():
    transport = EchoTransport()
    with make(transport=transport, batch_size=4).open():
        pass
    stopped = make(transport=transport, batch_size=4, **STALE)
    stopped.next(0)
    with pytest.raises(EarlyEndError), stopped.open():
        raise EarlyEndError(75, "asked to stop")
    with pytest.raises(OSError, match="disk"), make(transport=transport, batch_size=4).open():
        raise OSError("disk")
    ends = [call for call in transport.calls if isinstance(call, End)]
    assert ends == [End(code=0, reason=""), End(code=75, reason="asked to stop")]
    # What was under way has been waited for.
    assert transport.calls[-2:] == [("answer",), ends[1]]
