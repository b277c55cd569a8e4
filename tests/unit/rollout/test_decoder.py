"""Weights packed for decoding and prompts read once, against the plain ways."""

from collections import deque

import pytest
import torch

from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.rollout.decoder import generating
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.products import matrix_product
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.slots import Response, SlotGroup

VOCAB = 50


@pytest.mark.parametrize("shape", [(1, 24), (32, 24), (5, 3, 24), (0, 24)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_product_is_the_plain_one(shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(7, 24, generator=generator), torch.randn(7, generator=generator)
    x = torch.randn(shape, generator=generator)
    found = matrix_product(weight)(x, bias if with_bias else None)
    expected = x.double() @ weight.double().T + (bias if with_bias else 0.0)
    torch.testing.assert_close(found, expected.float())


def test_packed_bfloat16_product_is_rounded_once():
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(9, 24, generator=generator).bfloat16() for _ in range(2))
    expected = (x.double() @ weight.double().T).bfloat16()
    # One unit in the last place, where float32 sums fall on the other side of a tie.
    torch.testing.assert_close(matrix_product(weight)(x, None), expected, rtol=2**-7, atol=1e-3)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request):
    config = Config.model_validate(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 48,
                "vocab_size": VOCAB,
            },
            "precision": {"dtype": request.param},
            "reward": {"source": "random"},
        }
    )
    mesh = create_mesh(config.parallel)
    yield build_chunks(config.model, config.precision, mesh, head="language"), mesh
    destroy_mesh()


def greedy(chunks, mesh):
    return Generator(chunks, mesh, eos_id=-1).generate(
        [[3, 4, 5], [6], [7, 8]],
        range(3),
        rule=SamplingRule(temperature=1.0, top_k=1),
        max_response_tokens=[6, 9, 4],
        slots=2,
        seed=0,
        step=0,
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


def test_samples_of_one_prompt_read_it_once():
    prompts = [[5, 6, 7], [5, 6, 7], [8, 9], [8, 9], [5, 6]]
    waiting = deque(Response(i, prompt, 4) for i, prompt in enumerate(prompts))
    work = SlotGroup(4, waiting, torch.device("cpu")).next_work()
    assert work.tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert work.rows.tolist() == [0, 0, 1, 1]
    assert work.lengths.tolist() == [3, 3, 2, 2]
    assert [r.prompt for r in waiting] == [[5, 6]]


def test_a_shared_prompt_is_answered_as_if_it_were_read_for_each_sample(model):
    chunks, mesh = model
    fill_random(chunks, mesh, seed=1)
    prompts = [[3, 4, 5], [3, 4, 5], [6, 7], [3, 4, 5], [6, 7]]

    def sampled(slots):
        return Generator(chunks, mesh, eos_id=-1).generate(
            prompts,
            range(5),
            rule=SamplingRule(temperature=1.0),
            max_response_tokens=7,
            slots=slots,
            seed=0,
            step=0,
        )

    together, alone = sampled(5), sampled(1)
    assert together.responses == alone.responses
    assert len({tuple(r) for r in together.responses}) == 5
    atol = 1e-5 if chunks[0].config.params_dtype == torch.float32 else 0.02
    torch.testing.assert_close(together.logprobs, alone.logprobs, rtol=0, atol=atol)


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
