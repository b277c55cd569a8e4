"""What is done around vLLM, with a stand-in for it; tests/vllm/ has the real one."""

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from marlhf_mega.rollout import vllm_engine
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.vllm_engine import EMBEDDING_NAME, VllmEngine
from marlhf_mega.rollout.vllm_requests import EngineRequest

RULE = SamplingRule(temperature=1.0)


class Model(nn.Module):
    """An embedding whose rows two ranks share, a norm, experts, and a head that is tied."""

    def __init__(self):
        super().__init__()
        self.packed = []
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(4, 2)
        self.model.norm = nn.LayerNorm(2, bias=False)
        self.model.experts = nn.Identity()
        self.model.experts.quant_method = SimpleNamespace(moe_kernel="packed once")
        self.lm_head = nn.Identity()
        pack = self.packed.append
        self.lm_head.quant_method = SimpleNamespace(process_weights_after_loading=pack)


class Llm:
    """Notes what it is asked; loads what it gets, unless it is broken; answers from `script`."""

    def __init__(self, *, broken=False):
        self.calls, self.aborted, self.script, self.broken = [], [], [], broken
        self.model = Model()
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self.model))
        executor = SimpleNamespace(driver_worker=SimpleNamespace(worker=worker))
        core = SimpleNamespace(engine_core=SimpleNamespace(model_executor=executor))
        self.llm_engine = SimpleNamespace(
            engine_core=core,
            add_request=lambda *request: self.calls.append(("add", *request[:2])),
            has_unfinished_requests=lambda: bool(self.script),
            step=self.step,
            abort_request=self.aborted.extend,
        )

    def wake_up(self, tags):
        self.calls.append(("wake_up", *tags))

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def reset_prefix_cache(self):
        self.calls.append("reset_prefix_cache")

    def collective_rpc(self, method, kwargs):
        found = dict(kwargs["weights_iterator"])
        self.calls.append((method, *found))
        with torch.no_grad():
            for name, values in found.items():
                parameter = self.model.get_parameter(name)
                wanted = values[4:] if name == EMBEDDING_NAME else values
                parameter[: len(wanted)] = wanted + self.broken

    def step(self):
        random.random()
        torch.rand(1)
        return self.script.pop(0)


def engine_with(llm, *, on_gpu=False, verify_interval=None):
    engine = VllmEngine.__new__(VllmEngine)
    engine._llm, engine._on_gpu, engine._tensor_rank = llm, on_gpu, 1
    engine._num_loads, engine._verify_interval = 0, verify_interval
    engine._vocab_size, engine._eager = 32, True
    return engine


def weights():
    """The second rank has the rows from 4 on: one of five, and padding."""
    return iter(
        [(EMBEDDING_NAME, torch.arange(10.0).view(5, 2)), ("model.norm.weight", torch.ones(2))]
    )


def test_on_a_gpu_memory_is_taken_for_weights_then_for_the_cache_and_given_back():
    llm = Llm()
    engine = engine_with(llm, on_gpu=True)
    with engine.filled(weights()):
        llm.calls.append("generate")
    assert llm.calls == [
        ("wake_up", "weights"),
        ("reload_weights", EMBEDDING_NAME, "model.norm.weight"),
        ("wake_up", "kv_cache"),
        "reset_prefix_cache",
        "generate",
        ("sleep", 2),
    ]


def test_on_a_cpu_experts_and_a_tied_head_are_packed_again_and_nothing_sleeps():
    llm = Llm()
    with engine_with(llm).filled(weights()):
        assert llm.model.model.experts.quant_method.moe_kernel is None
        assert llm.model.packed == [llm.model.lm_head]
    assert [call for call in llm.calls if "sleep" in call] == []


def test_weights_that_do_not_arrive_are_found_the_first_time():
    engine = engine_with(Llm(broken=True))
    with (
        pytest.raises(RuntimeError) as error,
        engine.filled(weights()),
    ):
        pass
    assert str(error.value) == (
        f"rollout.engine=vllm: {EMBEDDING_NAME} must have its trained values in the engine; it has "
        "others. Use rollout.engine=own, and report this with the version of vLLM."
    )


@pytest.mark.parametrize(("interval", "found"), [(None, [0]), (1, [0, 1, 2, 3]), (3, [0, 3])])
def test_later_weights_are_compared_at_the_interval_that_is_asked(interval, found):
    llm = Llm()
    engine = engine_with(llm, verify_interval=interval)
    seen = []
    for load in range(4):
        llm.broken = True
        try:
            engine._load(weights())
        except RuntimeError:
            seen.append(load)
            engine._num_loads += 1  # a run would have ended
    assert seen == found


def output(number, *tokens, finished=False):
    places = list(range(len(tokens) + 1))
    logprobs = SimpleNamespace(
        start_indices=places[:-1], end_indices=places[1:], logprobs=[-float(t) for t in tokens]
    )
    part = SimpleNamespace(token_ids=tokens, logprobs=logprobs)
    return SimpleNamespace(request_id=str(number), outputs=[part], finished=finished)


def test_a_text_ends_a_response_with_the_token_that_completes_it(monkeypatch):
    """Tokens are letters: `bc` may come in one piece with more behind it."""
    monkeypatch.setattr(vllm_engine, "sampling_params", lambda *_, **__: None)
    llm = Llm()
    llm.script = [
        [output(0, 1), output(1, 2)],
        [output(0, 2), output(1, 3, 4)],
        [output(0, 2, finished=True), output(1, 9)],
    ]
    stop = StopRule(texts=(b"bc",), token_bytes=[bytes([96 + i]) for i in range(10)])
    requests = [EngineRequest(prompt=[5], max_tokens=3, seed=0) for _ in range(2)]
    before = random.getstate(), torch.get_rng_state()
    found = engine_with(llm).complete(requests, rule=RULE, stop=stop)
    assert [response.tokens for response in found] == [[1, 2, 2], [2, 3]]
    assert [response.logprobs for response in found] == [[-1, -2, -2], [-2, -3]]
    assert llm.aborted == ["1"]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
