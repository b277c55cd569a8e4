"""Last-layer pruning runs only the tokens that the head reads, and changes no result."""

import pytest
import torch

from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.schema import Config
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.last_layer_pruning import can_prune
from marlhf_mega.models.spec import TransformerConfig
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh

SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "vocab_size": 40,
    "init_std": 0.3,
}


@pytest.fixture(scope="module")
def mesh():
    yield create_mesh(Config().parallel)
    destroy_mesh()


def batch(*, packed=False, responses=((4, 5), (6, 7, 8, 9), ())):
    prompts = [[1, 2, 3], [2], [3, 4]]
    return SequenceBatch.create(
        prompts,
        [list(r) for r in responses],
        multiple=4,
        device=torch.device("cpu"),
        packed=packed,
    )


def build(mesh, head):
    config = Config.model_validate({"model": SHAPE})
    (chunk,) = build_chunks(config.model, config.precision, mesh, head=head)
    fill_random([chunk], mesh, seed=3)
    return chunk


def run(chunk, sequences):
    """Return the output, the gradients, and the tokens that each feed-forward block saw."""
    seen = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2]))
        for layer in chunk.decoder.layers
    ]
    output = chunk(sequences)
    for hook in hooks:
        hook.remove()
    (output * torch.arange(1.0, output.numel() + 1).view(output.shape)).sum().backward()
    return output.detach(), {n: p.grad for n, p in chunk.named_parameters()}, seen


@pytest.mark.parametrize("head", ["language", "scalar"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_last_layer_skips_prompts_and_results_stay_equal(mesh, head, packed):
    output, gradients, seen = run(build(mesh, head), batch(packed=packed))
    width = (1, 12) if packed else (3, 8)
    assert [tuple(shape) for shape in seen] == [width[::-1], (6, 1)]
    whole = build(mesh, head)
    whole._prunes = False
    wanted, expected, everything = run(whole, batch(packed=packed))
    assert {tuple(shape) for shape in everything} == {width[::-1]}
    torch.testing.assert_close(output, wanted)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4)


def test_without_any_response_one_token_remains(mesh):
    output, gradients, seen = run(build(mesh, "language"), batch(responses=((), (), ())))
    assert tuple(seen[-1]) == (1, 1)
    assert output.tolist() == torch.zeros(2, 3, 1).tolist()
    assert all(not gradient.any() for gradient in gradients.values())


def test_all_logits_can_be_computed_after_a_pruned_pass(mesh):
    chunk = build(mesh, "language")
    before = chunk.logits(batch())
    chunk(batch())
    assert before.shape[:2] == (3, 8)
    torch.testing.assert_close(chunk.logits(batch()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"recompute_granularity": "selective"}, True),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, False),
        ({"num_moe_experts": 4}, False),
        ({"fp8": "hybrid"}, False),
    ],
)
def test_layouts_that_cannot_prune(settings, expected):
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, **settings)
    assert can_prune(config) is expected
