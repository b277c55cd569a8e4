"""A model as transformers' config.json, and what an architecture cannot say."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.config.hf import fields_from_hf, head_of_hf_config
from marlhf_mega.config.hf_write import hf_config_from_model
from marlhf_mega.config.model import ModelConfig, RopeScaling


def test_vocabulary_must_be_known_to_write():
    with pytest.raises(ValueError, match="model.vocab_size: a Hugging Face model needs it"):
        hf_config_from_model(ModelConfig())


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"qkv_bias": True}, "qkv_bias"),
        ({"qk_norm": True}, "qk_norm"),
        ({"logits_softcap": 30.0}, "logits_softcap"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"num_experts": 4}, "num_experts"),
        ({"query_scale": 3.0}, "query_scale"),
        ({"architecture": "mistral", "sliding_window": 4, "sliding_window_every": 2}, "every"),
        ({"architecture": "gemma", "activation": "gelu_tanh"}, "embedding_scale"),
        ({"architecture": "mixtral"}, "num_experts must be a positive integer"),
    ],
)
def test_model_that_its_architecture_cannot_express(fields, key):
    with pytest.raises(ValueError, match=key):
        hf_config_from_model(ModelConfig(vocab_size=100, **fields))


@given(
    st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 48]),
    st.booleans(),
    st.sampled_from([None, 4]),
    st.sampled_from(
        [
            RopeScaling(),
            RopeScaling(kind="linear", factor=2.0),
            RopeScaling(kind="llama3", factor=8.0, original_max_positions=64),
        ]
    ),
)
def test_written_config_reads_back_as_the_same_model(
    architecture, groups, head_dim, tied, window, rope
):
    gemma = architecture.startswith("gemma")
    slides = architecture not in ("llama", "gemma")
    config = ModelConfig(
        architecture=architecture,
        vocab_size=100,
        num_query_groups=groups,
        head_dim=head_dim,
        tied_embeddings=tied,
        activation="gelu_tanh" if gemma else "silu",
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        zero_centered_norm=gemma,
        embedding_scale=gemma,
        post_norms=architecture == "gemma2",
        attention_softcap=20.0 if architecture == "gemma2" else None,
        query_scale=24.5 if architecture == "gemma2" else None,
        sliding_window=window if slides else None,
        sliding_window_every=2 if architecture == "gemma2" and window else 1,
        rope_theta=5e5,
        rope_scaling=rope,
    )
    hf = json.loads(json.dumps(hf_config_from_model(config, pad_token_id=0)))
    fields = fields_from_hf(hf, where="W")
    derived = {"head_dim", "query_scale"}
    assert {n: v for n, v in fields.items() if n not in derived} == {
        n: getattr(config, n) for n in fields if n not in derived
    }
    assert fields["head_dim"] == config.kv_channels
    assert head_of_hf_config(hf, where="W") == "causal_lm"
