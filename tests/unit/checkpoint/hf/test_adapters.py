"""Every element of every adapter is on exactly one first replica, at any tensor-parallel size."""

from collections import Counter

import pytest

from marlhf_mega.checkpoint.hf.adapters import AdapterTable, is_same_base
from marlhf_mega.checkpoint.hf.table import Layout
from marlhf_mega.config.lora import FUSED
from marlhf_mega.config.model import ModelConfig

# One group of keys and values on up to four ranks.
SHAPE = {
    "num_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_query_groups": 1,
    "head_dim": 4,
    "ffn_hidden_size": 12,
    "vocab_size": 10,
}


def table_of(**lora):
    return AdapterTable(ModelConfig(**SHAPE, lora={"rank": 3, **lora}), "causal_lm")


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "targets", [["all-linear"], ["q_proj", "v_proj"], ["k_proj", "up_proj", "o_proj"]]
)
def test_every_element_is_exported_once(size, targets):
    table, counts = table_of(targets=targets), Counter()
    for rank in range(size):
        layout = Layout(padded_vocab_size=16, tp_rank=rank, tp_size=size)
        for projection in FUSED:
            if not table.config.lora.adapted(projection):
                continue
            for half in "ab":
                name = f"decoder.layers.0.{projection}.lora.{half}"
                shard = table.shard(name, 1, layout)
                for piece in shard.pieces:
                    if piece.name is not None and shard.is_primary:
                        counts.update((piece.name, piece.dim, i) for i in range(piece.lo, piece.hi))
    assert set(counts.values()) == {1}
    found = Counter(name for name, _, _ in counts)
    expected = {n: s for n, s in table.tensors.items() if ".layers.1." in n}
    assert found.keys() == expected.keys()
    for name, number in found.items():
        assert number in expected[name], name


def test_names_and_shapes_are_those_of_peft():
    tensors = table_of(targets=["q_proj", "v_proj", "down_proj"]).tensors
    first = {n: s for n, s in tensors.items() if ".layers.0." in n}
    assert first == {
        "model.layers.0.self_attn.q_proj.lora_A.weight": (3, 8),
        "model.layers.0.self_attn.v_proj.lora_A.weight": (3, 8),
        "model.layers.0.self_attn.q_proj.lora_B.weight": (16, 3),
        "model.layers.0.self_attn.v_proj.lora_B.weight": (4, 3),
        "model.layers.0.mlp.down_proj.lora_A.weight": (3, 12),
        "model.layers.0.mlp.down_proj.lora_B.weight": (8, 3),
    }
    assert len(tensors) == 12


def test_a_row_without_an_adapter_belongs_to_no_tensor():
    table = table_of(targets=["q_proj"])
    shard = table.shard(
        "decoder.layers.0.self_attention.linear_qkv.lora.b", 0, Layout(padded_vocab_size=16)
    )
    names = [(piece.name or "none")[-20:] for piece in shard.pieces]
    assert names == ["q_proj.lora_B.weight", "none", "none"]
    assert shard.shape == (24, 3)


def test_a_base_is_the_same_with_a_scalar_head():
    assert is_same_base("a", "a")
    assert is_same_base("a-b", "a")
    assert is_same_base(None, None)
    assert not is_same_base("a-b", "a-c")
    assert not is_same_base("a-b", "c-b")
    assert not is_same_base("a", None)
