"""Weights packed for decoding and prompts read once, against the plain ways."""

import pytest
import torch

from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.rollout.decoder import generating
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions


def greedy(chunks, mesh):
    return Generator(chunks, mesh, stop=StopRule()).generate(
        [[3, 4, 5], [6], [7, 8]],
        range(3),
        RolloutOptions(
            rule=SamplingRule(temperature=1.0, top_k=1),
            max_response_tokens=dict(enumerate([6, 9, 4])),
            slots=2,
            seed=0,
            step=0,
        ),
    )


def test_each_call_reads_the_weights_as_they_then_stand(model):
    chunks, mesh = model
    answers = []
    for seed in (1, 2, 1):
        fill_random(chunks, mesh, seed=seed)
        answers.append(greedy(chunks, mesh).responses)
    assert answers[0] == answers[2] != answers[1]


def fail_while_generating(chunks, seen):
    with generating(chunks):
        seen.extend(attributes(chunks))
        raise KeyError


def attributes(chunks):
    return [set(module.__dict__) for chunk in chunks for module in chunk.modules()]


def test_training_gets_its_own_products_back_even_after_an_error(model):
    chunks, _ = model
    before, seen = attributes(chunks), []
    with pytest.raises(KeyError):
        fail_while_generating(chunks, seen)
    assert seen != before
    assert attributes(chunks) == before
    assert all(chunk.training for chunk in chunks)


class EngineLinear(torch.nn.Module):
    """Settles how to quantise when it first computes, as Transformer Engine's layers do."""

    def __init__(self):
        super().__init__()
        self.sequence_parallel = True
        self.fp8_initialized = self.fp8_meta_tensors_initialized = False

    def forward(self):
        if not self.fp8_initialized and not self.fp8_meta_tensors_initialized:
            self.shares_scales = self.sequence_parallel
        self.fp8_initialized = self.fp8_meta_tensors_initialized = True
        return self.shares_scales


def test_generating_leaves_no_quantizers_behind_that_do_not_know_of_shared_sequences(model):
    (chunk,), _ = model
    chunk.config.fp8_recipe = "tensorwise"
    chunk.engine_linear = EngineLinear()
    with generating([chunk]):
        assert not chunk.engine_linear()
    assert chunk.engine_linear()
    with generating([chunk]):
        assert not chunk.engine_linear()
    del chunk.engine_linear
    chunk.config.fp8_recipe = "delayed"
