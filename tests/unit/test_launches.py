"""How many kernels a GPU would launch to generate, and how often its host would wait.

Counted on the meta device, where whatever reads a value on the host raises. With launches of about
5 us each, a step of a small model costs what it launches.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import ParallelConfig, PrecisionConfig
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.parallel.fake_mesh import fake_mesh
from marlhf_mega.rollout import recorded, slots
from marlhf_mega.rollout.decoder import ChunkDecoder, generating
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule, sample_tokens
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.rollout.work import Decode, Prefill
from tests.operators import Operators

LAYERS, SLOTS = 3, 8
MODEL = {
    "num_layers": LAYERS,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "ffn_hidden_size": 96,
    "vocab_size": 1000,
}
FAMILIES = {
    "llama": {},
    "qwen3": {"qkv_bias": True, "qk_norm": True},
    "gemma2": {
        "post_norms": True,
        "attention_softcap": 50.0,
        "sliding_window": 8,
        "sliding_window_every": 2,
    },
}


@contextmanager
def policy(ranks, *, rank=0, **more):
    """A rank's part of a model for GPUs, without Transformer Engine."""
    with fake_mesh(ParallelConfig(tensor_size=ranks), rank=rank, world_size=ranks) as mesh:
        mesh = replace(mesh, platform=replace(mesh.platform, name="cuda"))
        model = ModelConfig.model_validate(MODEL | more)
        yield build_chunks(model, PrecisionConfig(), mesh, head="language"), mesh


def works():
    zeros = torch.zeros(SLOTS, dtype=torch.int64)
    return {
        "decode": Decode(tokens=zeros[:, None], positions=zeros, longest=20),
        "prefill": Prefill(
            tokens=torch.zeros(4, 16, dtype=torch.int64), rows=zeros, lengths=zeros, first_slot=0
        ),
    }


def launched(run):
    with Operators() as found:
        run()
    return found.total


# A norm of our own takes four kernels, Transformer Engine's one: see test_engine.py for those.
@pytest.mark.parametrize(
    ("family", "ranks", "decode", "prefill"),
    [
        ("llama", 1, 23, 26),
        ("llama", 2, 25, 28),
        ("qwen3", 1, 33, 36),
        ("gemma2", 1, 36, 46),
    ],
)
def test_a_layer_takes_few_kernels(family, ranks, decode, prefill):
    with policy(ranks, **FAMILIES[family]) as (chunks, _), generating(chunks):
        decoder = ChunkDecoder(chunks[0], num_slots=SLOTS, max_tokens=24)
        layers, found = decoder.layers, {}
        for name, work in works().items():
            # The last layer is taken off: what a step does once does not count.
            decoder.layers = layers
            whole = launched(partial(decoder.run, work, None))
            decoder.layers = layers[:-1]
            found[name] = whole - launched(partial(decoder.run, work, None))
    assert (found["decode"] <= decode, found["prefill"] <= prefill) == (True, True), found


@pytest.mark.parametrize(
    ("rule", "alone", "of_two"),
    [
        (SamplingRule(temperature=1.0), 13, 20),
        (SamplingRule(temperature=0.7), 14, 21),
        (SamplingRule(temperature=0.0), 6, 13),
        (SamplingRule(temperature=1.0, top_k=50, top_p=0.9), 49, 55),
        # Of two ranks or more none sorts the whole vocabulary.
        (SamplingRule(temperature=1.0, top_p=0.9), 34, 91),
        (SamplingRule(temperature=1.0, top_p=0.9, record_kept=True), 41, 110),
    ],
)
def test_a_draw_takes_few_kernels(rule, alone, of_two):
    found = []
    for ranks in (1, 2):
        with policy(ranks, rank=ranks - 1) as (chunks, _), torch.inference_mode():
            shard = chunks[0].vocab_shard
            logits = torch.zeros(SLOTS, shard.num_real)
            uniform = torch.zeros(SLOTS, dtype=torch.float64)
            draw = partial(sample_tokens, logits, uniform, rule=rule, shard=shard)
            found.append(launched(draw))
    assert (found[0] <= alone, found[1] <= of_two) == (True, True), found


@pytest.mark.parametrize(
    ("rule", "kernels"),
    [
        (SamplingRule(temperature=1.0), 40),
        (SamplingRule(temperature=1.0, top_p=0.9, record_kept=True), 70),
    ],
)
def test_a_step_waits_once(monkeypatch, rule, kernels):
    """Of responses that all go on; the kernels are those outside the layers."""
    waits = []

    def fetch(*tensors):
        waits.append(len(tensors))
        return [torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu") for tensor in tensors]

    monkeypatch.setattr(slots, "fetch", fetch)
    found = []
    with policy(1) as (chunks, mesh):
        generator = Generator(chunks, mesh, stop=StopRule(frozenset({2})))
        for length in (4, 10):
            options = RolloutOptions(rule=rule, max_response_tokens=length, seed=0, step=0)
            with Operators() as operators:
                rollout = generator.generate([[5, 6], [7]], [0, 1], options)
            assert [len(response) for response in rollout.responses] == [length] * 2
            found.append((operators.total, len(waits)))
    assert [number for _, number in found] == [4, 4 + 10]
    assert found[1][0] - found[0][0] <= 6 * (kernels + LAYERS * 23)


@pytest.mark.parametrize("ranks", [1, 2])
def test_beside_a_graph_a_step_launches_little(monkeypatch, ranks):
    """Tokens are drawn inside: numbers are chosen, three inputs copied, the result, and two books.

    An eighth is the stand-in's for the copy to the host.
    """
    monkeypatch.setattr(recorded, "GraphRecorder", lambda: lambda step: (step(), lambda: None))
    monkeypatch.setattr(recorded, "any_rank", lambda flag, *_: flag)
    monkeypatch.setattr(
        slots, "fetch", lambda *given: [torch.zeros(t.shape, device="cpu") for t in given]
    )
    rule, found = SamplingRule(temperature=1.0), []
    with policy(ranks) as (chunks, mesh):
        generator = Generator(chunks, mesh, stop=StopRule(frozenset({2})), cuda_graphs=True)
        for length in (20, 20, 50):
            options = RolloutOptions(rule=rule, max_response_tokens=length, seed=0, step=0)
            with Operators() as operators:
                generator.generate([[5, 6], [7]], [0, 1], options)
            found.append(operators.total)
    assert (found[2] - found[1]) / 30 <= 8
