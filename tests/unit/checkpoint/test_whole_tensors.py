"""Whole tensors of one rank; layouts and buckets are in tests/distributed/test_reshard.py."""

import pytest
import torch

from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.checkpoint.whole_tensors import WholeTensors
from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh

SIZES = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 20}


@pytest.fixture(scope="module")
def mesh():
    joined = create_mesh(Config().parallel)
    yield joined
    destroy_mesh()


def test_adapters_are_merged_for_as_long_as_tensors_are_read(mesh):
    """Of the output projection: W + alpha / rank * B A."""
    lora = {"rank": 2, "alpha": 6.0, "targets": ["o_proj"]}
    model = SIZES | {"vocab_size": 30, "lora": lora}
    config = Config.model_validate({"model": model, "precision": {"dtype": "float32"}})
    (chunk,) = build_chunks(config.model, config.precision, mesh, head="language")
    fill_random([chunk], mesh, seed=1)
    layer = chunk.decoder.layers[0].self_attention.linear_proj
    for matrix in (layer.lora.a, layer.lora.b):
        torch.nn.init.normal_(matrix)
    before = {name: p.detach().clone() for name, p in chunk.named_parameters()}
    weights = WholeTensors(([chunk], mesh), config.model, mesh, receives=True)
    found = dict(weights)
    merged = layer.weight + 3 * layer.lora.b @ layer.lora.a
    name = "model.layers.0.self_attn.o_proj.weight"
    torch.testing.assert_close(found[name], merged.detach())
    assert torch.equal(found["model.layers.0.mlp.down_proj.weight"], _down(chunk))
    assert all(torch.equal(p, before[name]) for name, p in chunk.named_parameters())
    assert weights.total_bytes == 0
    assert weights.seconds > 0


def test_a_rank_that_only_sends_gets_nothing(mesh):
    config = Config.model_validate({"model": SIZES | {"vocab_size": 30}})
    chunks = build_chunks(config.model, config.precision, mesh, head="language")
    weights = WholeTensors((chunks, mesh), config.model, mesh, receives=False)
    assert list(weights) == []
    weights.move()


def _down(chunk):
    return chunk.decoder.layers[0].mlp.linear_fc2.weight
