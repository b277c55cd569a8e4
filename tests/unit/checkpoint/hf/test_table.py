import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlhf_mega.checkpoint.hf.table import Layout, Piece, WeightTable
from marlhf_mega.config.model import ModelConfig
from tests.unit.checkpoint.hf.virtual_ranks import Degrees, virtual_ranks

SMALL = ModelConfig(
    architecture="llama",
    num_layers=1,
    hidden_size=4,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=1,
    ffn_hidden_size=6,
    vocab_size=5,
)


def pieces(name, layout, config=SMALL, head="causal_lm", layer=0):
    return WeightTable(config, head).shard(name, layer, layout).pieces


def test_query_key_value_rows_are_ordered_by_group():
    q, k, v = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv")
    found = pieces("decoder.layers.0.self_attention.linear_qkv.weight", Layout(padded_vocab_size=8))
    assert found == (
        Piece(q, 0, 0, 2),
        Piece(k, 0, 0, 1),
        Piece(v, 0, 0, 1),
        Piece(q, 0, 2, 4),
        Piece(k, 0, 1, 2),
        Piece(v, 0, 1, 2),
    )


def test_more_ranks_than_groups_split_a_group():
    q, k, v = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv")
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    layout = {"padded_vocab_size": 8, "tp_size": 4}
    assert pieces(name, Layout(tp_rank=2, **layout)) == (Piece(q, 0, 2, 4),)
    assert pieces(name, Layout(tp_rank=3, **layout)) == (Piece(k, 0, 1, 2), Piece(v, 0, 1, 2))


def test_gate_and_up_are_sharded_separately():
    found = pieces(
        "decoder.layers.0.mlp.linear_fc1.weight",
        Layout(padded_vocab_size=8, tp_rank=1, tp_size=2),
    )
    assert found == (
        Piece("model.layers.0.mlp.gate_proj.weight", 0, 3, 6),
        Piece("model.layers.0.mlp.up_proj.weight", 0, 3, 6),
    )


def test_vocabulary_is_padded_with_zeros_on_the_last_ranks():
    name, layout = "embedding.word_embeddings.weight", {"padded_vocab_size": 12, "tp_size": 3}
    embed = "model.embed_tokens.weight"
    assert pieces(name, Layout(tp_rank=0, **layout), layer=None) == (Piece(embed, 0, 0, 4),)
    assert pieces(name, Layout(tp_rank=1, **layout), layer=None) == (
        Piece(embed, 0, 4, 5),
        Piece(None, 0, 5, 8),
    )
    assert pieces(name, Layout(tp_rank=2, **layout), layer=None) == (Piece(None, 0, 8, 12),)


def test_experts_are_numbered_over_expert_ranks_and_sharded_over_their_tensor_ranks():
    config = SMALL.model_copy(update={"architecture": "mixtral", "num_experts": 4})
    layout = Layout(
        padded_vocab_size=8, tp_rank=1, tp_size=2, ep_rank=1, ep_size=2, etp_rank=0, etp_size=1
    )
    local = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"
    engine = "decoder.layers.0.mlp.experts.linear_fc2.weight1"
    expected = (Piece("model.layers.7.block_sparse_moe.experts.3.w2.weight", 1, 0, 6),)
    assert pieces(local, layout, config, layer=7) == expected
    assert pieces(engine, layout, config, layer=7) == expected


def test_engine_norms_are_the_norms_of_the_local_spec():
    table, layout = WeightTable(SMALL, "causal_lm"), Layout(padded_vocab_size=8)
    for engine, local in {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }.items():
        shards = [table.shard(f"decoder.layers.0.{n}", 3, layout) for n in (engine, local)]
        assert shards[0] == shards[1]


def test_a_parameter_without_counterpart_is_refused():
    with pytest.raises(RuntimeError) as error:
        pieces("decoder.layers.0.self_attention.linear_qkv.bias", Layout(padded_vocab_size=8))
    assert str(error.value) == (
        "decoder.layers.0.self_attention.linear_qkv.bias: every parameter must have a Hugging Face "
        "counterpart; model.architecture=llama has none for this one. Change the architecture."
    )


DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe")


@st.composite
def models_and_degrees(draw):
    architecture = draw(st.sampled_from(DENSE + SPARSE))
    sparse = architecture in SPARSE
    tp, dp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    pp, vpp = draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2)]))
    etp = draw(st.sampled_from([1, tp])) if sparse else 1
    ep = draw(st.sampled_from([n for n in (1, 2, 4) if tp * dp % (etp * n) == 0])) if sparse else 1
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    config = ModelConfig(
        architecture=architecture,
        num_layers=4,
        hidden_size=8,
        num_attention_heads=8,
        num_query_groups=groups,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        ffn_hidden_size=12,
        vocab_size=draw(st.integers(1, 40)),
        qkv_bias=architecture.startswith("qwen2"),
        qk_norm=architecture.startswith("qwen3"),
        post_norms=architecture == "gemma2",
        tied_embeddings=draw(st.booleans()),
        num_experts=4 if sparse else None,
        expert_ffn_hidden_size=4 if sparse else None,
        shared_expert_ffn_hidden_size=8 if architecture == "qwen2_moe" else None,
    )
    head = draw(st.sampled_from(["causal_lm", "sequence_classification"]))
    return config, head, Degrees(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, dp=dp)


@settings(max_examples=60, deadline=None)
@given(models_and_degrees(), st.booleans())
def test_every_element_is_written_once_and_read_by_every_replica(model, engine):
    config, head, degrees = model
    table = WeightTable(config, head)
    written = {name: np.zeros(shape, int) for name, shape in table.tensors.items()}
    read = {name: np.zeros(shape, int) for name, shape in table.tensors.items()}
    for rank in virtual_ranks(config, head, degrees, engine=engine):
        for name, layer in rank.names:
            shard = table.shard(name, layer, rank.layout)
            for piece in shard.pieces:
                if piece.name is None:
                    continue
                where = (slice(None),) * piece.dim + (slice(piece.lo, piece.hi),)
                read[piece.name][where] += 1
                written[piece.name][where] += shard.is_primary
    for name in table.tensors:
        assert (written[name] == 1).all(), name
        assert read[name].min() == read[name].max() >= 1, name
