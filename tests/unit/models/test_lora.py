"""Adapters on one rank, against matrices written out by hand. Layouts and peft: test_lora.py."""

import pytest
import torch

from marlhf_mega.checkpoint.weights import digest_of_base, fill_adapters, fill_random
from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.lora import (
    adapters_of,
    merge_for_good,
    merged_adapters,
    without_adapters,
)
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions

SIZES = {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 4,
    "ffn_hidden_size": 20,
    "vocab_size": 30,
}


@pytest.fixture(scope="module")
def mesh():
    mesh = create_mesh(Config().parallel)
    yield mesh
    destroy_mesh()


def build(mesh, head="language", seed=1, dtype="float32", **lora):
    config = Config.model_validate(
        {"model": SIZES | {"lora": {"rank": 2, **lora}}, "precision": {"dtype": dtype}}
    )
    (chunk,) = build_chunks(config.model, config.precision, mesh, head=head)
    fill_random([chunk], mesh, seed=seed)
    fill_adapters([chunk], mesh, seed=seed)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in adapters_of([chunk]):
            adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator))
    return chunk


def test_only_adapters_and_a_scalar_head_have_gradients_and_optimizer_state(mesh):
    for head, more in (("language", 0), ("scalar", 16)):
        chunk = build(mesh, head)
        state = TrainState([chunk], Config().policy, total_steps=1)
        # qkv: 3 * 2 * 16 + 32 * 2, o: 2 * 16 + 16 * 2, fc1: 2 * 2 * 16 + 40 * 2, fc2: 2 * 20 + 16 * 2
        expected = (96 + 64) + (32 + 32) + (64 + 80) + (40 + 32) + more
        assert sum(p.numel() for p in chunk.parameters() if p.requires_grad) == expected
        held = [group["params"] for group in state.optimizer.param_groups]
        assert sum(p.numel() for params in held for p in params) == expected
        assert sum(buffer.numel() for buffer in state.gradient_buffers()) < expected + 9 * 64 + 128


def test_the_rows_of_queries_keys_and_values_have_adapters_of_their_own(mesh):
    chunk = build(mesh, targets=["q_proj", "v_proj"], alpha=6)
    layer = chunk.decoder.layers[0].self_attention.linear_qkv
    hidden = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(2))
    plain = hidden @ layer.weight.T
    a_query, a_value = layer.lora.a.split(2)
    added = torch.zeros(5, 1, 32)
    for group in range(2):  # 2 queries, a key and a value of width 4 each
        query = slice(16 * group, 16 * group + 8)
        value = slice(16 * group + 12, 16 * group + 16)
        added[..., query] = 3 * hidden @ a_query.T @ layer.lora.b[query].T
        added[..., value] = 3 * hidden @ a_value.T @ layer.lora.b[value].T
    torch.testing.assert_close(layer(hidden)[0], plain + added)
    torch.testing.assert_close(hidden @ layer.lora.merged(layer.weight).T, plain + added)
    with without_adapters([chunk]):
        torch.testing.assert_close(layer(hidden)[0], plain, rtol=0, atol=0)


def test_gates_and_the_others_have_adapters_of_their_own(mesh):
    chunk = build(mesh, targets=["up_proj"])
    layer = chunk.decoder.layers[0].mlp.linear_fc1
    hidden = torch.randn(5, 1, 16, generator=torch.Generator().manual_seed(2))
    plain, adapted = hidden @ layer.weight.T, layer(hidden)[0]
    torch.testing.assert_close(adapted[..., :20], plain[..., :20])
    added = 2 * hidden @ layer.lora.a.T @ layer.lora.b[20:].T
    torch.testing.assert_close(adapted[..., 20:], plain[..., 20:] + added)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_thousand_switches_rollouts_and_exports_leave_every_bit(mesh, dtype):
    chunk = build(mesh, dtype=dtype)
    before = [p.detach().clone() for p in chunk.parameters()]
    generator = Generator([chunk], mesh, stop=StopRule())
    rule = SamplingRule(temperature=0.0)
    options = RolloutOptions(rule=rule, max_response_tokens=2, seed=0, step=0)
    for number in range(1000):
        with without_adapters([chunk]):
            pass
        with merged_adapters([chunk]):
            pass
        if number % 100 == 0:
            generator.generate([[1, 2, 3]], [0], options)
    assert all(p.equal(b) for p, b in zip(chunk.parameters(), before, strict=True))


def test_merged_for_good_there_are_no_adapters_any_more(mesh):
    chunk, other = build(mesh), build(mesh)
    hidden = torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(2))
    layers = [c.decoder.layers[0].mlp.linear_fc1 for c in (chunk, other)]
    merge_for_good([chunk])
    assert adapters_of([chunk]) == []
    assert not chunk.has_adapters
    torch.testing.assert_close(layers[0](hidden)[0], layers[1](hidden)[0])
    assert digest_of_base([chunk], mesh) != digest_of_base([other], mesh)


def test_the_hash_is_of_every_weight_but_adapters_and_a_scalar_head(mesh):
    first, second = build(mesh, "scalar"), build(mesh, "scalar")
    with torch.no_grad():
        second.output_layer.weight.add_(1)
        adapters_of([second])[0].b.add_(1)
    assert digest_of_base([first], mesh) == digest_of_base([second], mesh)
    assert len(digest_of_base([first], mesh)) == 16
    # A language head of its own is apart.
    body, head = digest_of_base([build(mesh)], mesh).split("-")
    assert body == digest_of_base([first], mesh)
    assert len(head) == 16
    for name, parameter in second.named_parameters():
        if ".lora." not in name and name != "output_layer.weight":
            with torch.no_grad():
                kept = parameter.flatten()[0].item()
                parameter.flatten()[0] = kept + 1e-3
                assert digest_of_base([first], mesh) != digest_of_base([second], mesh), name
                parameter.flatten()[0] = kept
