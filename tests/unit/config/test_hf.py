import json

import pytest

from marlhf_mega.config.hf import head_of_hf_config, model_config_from_hf
from marlhf_mega.config.model import ModelConfig, RopeScaling

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}


def write(folder, **fields):
    hf = {name: value for name, value in (LLAMA | fields).items() if value != "absent"}
    folder.joinpath("config.json").write_text(json.dumps(hf))
    return folder


def read(folder, **fields):
    return model_config_from_hf(write(folder, **fields), ModelConfig())


def refused(folder, **fields):
    with pytest.raises(ValueError, match=".") as error:
        read(folder, **fields)
    return str(error.value).replace(str(folder), "DIR")


def family(kind, **fields):
    prefix = {"qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe"}.get(kind, kind.capitalize())
    return {"model_type": kind, "architectures": [prefix + "ForCausalLM"]} | fields


def test_absent_fields_have_the_values_transformers_gives_them(tmp_path):
    llama = read(tmp_path)
    assert (llama.query_groups, llama.kv_channels, llama.norm_eps) == (8, 8, 1e-6)
    assert (llama.rope_theta, llama.tied_embeddings, llama.max_positions) == (1e4, False, 2048)
    gemma = read(tmp_path, **family("gemma", num_attention_heads=16))
    assert (gemma.query_groups, gemma.kv_channels, gemma.tied_embeddings) == (16, 256, True)
    gemma2 = read(tmp_path, **family("gemma2"))
    assert (gemma2.query_groups, gemma2.kv_channels, gemma2.tied_embeddings) == (4, 256, True)
    assert (gemma2.query_scale, gemma2.attention_softcap, gemma2.logits_softcap) == (256, 50, 30)
    assert (gemma2.sliding_window, gemma2.sliding_window_every) == (4096, 2)
    mistral = read(tmp_path, **family("mistral"))
    assert (mistral.query_groups, mistral.sliding_window) == (8, 4096)
    mixtral = read(tmp_path, **family("mixtral"))
    assert (mixtral.rope_theta, mixtral.norm_eps, mixtral.num_experts) == (1e6, 1e-5, 8)
    assert mixtral.expert_ffn_hidden_size == 96
    qwen3 = read(tmp_path, **family("qwen3", num_attention_heads=32))
    assert (qwen3.kv_channels, qwen3.qk_norm, qwen3.qkv_bias) == (128, True, False)
    qwen2 = read(tmp_path, **family("qwen2", num_key_value_heads=2))
    assert (qwen2.qkv_bias, qwen2.sliding_window) == (True, None)
    moe = read(tmp_path, **family("qwen2_moe", num_key_value_heads=2))
    assert (moe.num_experts, moe.experts_per_token, moe.router_softmax_first) == (60, 4, True)
    assert (moe.expert_ffn_hidden_size, moe.shared_expert_ffn_hidden_size) == (1408, 5632)
    moe = read(tmp_path, **family("qwen3_moe", num_experts=16, norm_topk_prob=True))
    assert (moe.num_experts, moe.experts_per_token, moe.router_softmax_first) == (16, 8, False)


def test_null_means_derived(tmp_path):
    config = read(tmp_path, head_dim=None, num_key_value_heads=None, rope_scaling=None)
    assert (config.head_dim, config.num_query_groups) == (8, 8)
    config = read(tmp_path, **family("mistral", sliding_window=None))
    assert config.sliding_window is None


LLAMA3_ROPE = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_both_styles_of_rotary_parameters(tmp_path):
    llama3 = RopeScaling(kind="llama3", factor=32.0, original_max_positions=8192)
    old = read(tmp_path, rope_theta=5e5, rope_scaling=LLAMA3_ROPE)
    new = read(tmp_path, rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5})
    assert old == new
    assert (old.rope_theta, old.rope_scaling) == (5e5, llama3)
    linear = read(tmp_path, rope_scaling={"type": "linear", "factor": 4.0})
    assert (linear.rope_scaling.kind, linear.rope_scaling.factor) == ("linear", 4.0)


def test_gemma_means_the_tanh_form_of_gelu(tmp_path):
    for fields in ({"hidden_act": "gelu"}, {"hidden_activation": "gelu_pytorch_tanh"}):
        config = read(tmp_path, **family("gemma", num_key_value_heads=1, **fields))
        assert config.activation == "gelu_tanh"
    assert read(tmp_path, hidden_act="gelu_pytorch_tanh").activation == "gelu_tanh"


def test_sliding_layers_of_qwen(tmp_path):
    qwen = family("qwen2", num_key_value_heads=2, sliding_window=16, use_sliding_window=True)
    assert read(tmp_path, **qwen, max_window_layers=0).sliding_window == 16
    assert read(tmp_path, **qwen, max_window_layers=4).sliding_window is None
    types = ["sliding_attention", "full_attention"] * 2
    config = read(tmp_path, **qwen, layer_types=types)
    assert (config.sliding_window, config.sliding_window_every) == (16, 2)
    off = qwen | {"use_sliding_window": False}
    assert read(tmp_path, **off, max_window_layers=2).sliding_window is None


def test_expert_count_under_the_name_of_transformers_5(tmp_path):
    config = read(tmp_path, **family("qwen3_moe", num_local_experts=6, num_experts_per_tok=2))
    assert config.num_experts == 6


def test_user_keeps_what_does_not_change_the_model(tmp_path):
    base = ModelConfig(hf_path="elsewhere", init="random", max_positions=32, init_std=0.1)
    config = model_config_from_hf(write(tmp_path), base)
    assert (config.init, config.max_positions, config.init_std) == ("random", 32, 0.1)
    assert config.hidden_size == 64


def test_resolved_config_reads_the_same_folder_again(tmp_path):
    config = read(tmp_path, **family("gemma2"))
    again = model_config_from_hf(tmp_path, ModelConfig(**config.model_dump()))
    assert again == config


def test_contradicting_keys_are_refused(tmp_path):
    base = ModelConfig(num_layers=3, hidden_size=64, qk_norm=True, num_query_groups=None)
    with pytest.raises(ValueError, match=".") as error:
        model_config_from_hf(write(tmp_path), base)
    assert str(error.value).splitlines() == [
        "model.num_layers=3: must be that of config.json in model.hf_path; it is 4 there. Remove "
        "the key.",
        "model.qk_norm=True: must be that of config.json in model.hf_path; it is False there. "
        "Remove the key.",
    ]


def test_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match="no config.json") as error:
        model_config_from_hf(tmp_path, ModelConfig(), key="reward.source")
    assert str(error.value) == (
        f"reward.source={tmp_path}: must be a Hugging Face folder; it has no config.json. Give the "
        "folder of a downloaded model."
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "must be JSON; Expecting property name"),
        ("[]", "must be a JSON object; it is a list"),
        ("\x00\xff", "must be JSON; "),
    ],
)
def test_damaged_config(tmp_path, text, said):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json") as error:
        model_config_from_hf(tmp_path, ModelConfig())
    assert str(error.value).startswith(f"model.hf_path={tmp_path}: config.json {said}")


def test_unknown_architecture_lists_the_known_ones(tmp_path):
    assert refused(tmp_path, model_type="phi3") == (
        "model.hf_path=DIR: config.json must name a known architecture (llama, mistral, qwen2, "
        "qwen3, gemma, gemma2, mixtral, qwen2_moe, qwen3_moe); it has model_type=phi3. Use a model "
        "of one of these families."
    )
    assert "model_type=None" in refused(tmp_path, model_type="absent")


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_unknown_rope_type(tmp_path, kind):
    expected = (
        "model.hf_path=DIR: config.json: rope type must be one of default, linear, llama3; it is "
        f"{kind}. Use a model without it, or remove the scaling if short contexts are enough."
    )
    assert refused(tmp_path, rope_scaling={"type": kind, "factor": 4.0}) == expected
    assert refused(tmp_path, rope_parameters={"rope_type": kind, "factor": 4.0}) == expected


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention_bias": True}, "attention_bias must be false; it is true"),
        ({"mlp_bias": True}, "mlp_bias must be false; it is true"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0; it is 0.5"),
        ({"hidden_size": "absent"}, "hidden_size must be a positive integer; it is null"),
        ({"vocab_size": 0}, "vocab_size must be a positive integer; it is 0"),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu, swish, gelu_pytorch_tanh; it is"),
        (
            {"quantization_config": {"bits": 4}},
            'quantization_config must be absent; it is {"bits": 4}',
        ),
        (
            family("gemma", hidden_act="relu"),
            "hidden_act must be one of gelu, gelu_pytorch_tanh; it is",
        ),
        (
            family("gemma2", use_bidirectional_attention=True),
            "use_bidirectional_attention must be false; it is true",
        ),
        (family("qwen3", attention_bias=True), "attention_bias must be false; it is true"),
        (family("qwen2_moe", decoder_sparse_step=2), "decoder_sparse_step must be 1; it is 2"),
        (family("qwen3_moe", mlp_only_layers=[0]), "mlp_only_layers must be []; it is [0]"),
        (
            family("qwen2_moe", use_sliding_window=True),
            "use_sliding_window must be false; it is true",
        ),
        (
            family("mixtral", num_local_experts=None),
            "num_experts must be a positive integer; it is null",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor must be 1.0; it is 0.5",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters must not differ by layer type; it has full_attention",
        ),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(tmp_path, fields, said):
    message = refused(tmp_path, **fields)
    assert message.startswith(f"model.hf_path=DIR: config.json: {said}")
    assert message.endswith(". Use another model.")


def test_fields_another_family_ignores_are_ignored(tmp_path):
    assert read(tmp_path, **family("qwen2", num_key_value_heads=2, attention_bias=True)).qkv_bias
    assert read(tmp_path, sliding_window=8, use_sliding_window=True).sliding_window is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_window_layers": 2}, "max_window_layers"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
    ],
)
def test_other_patterns_of_sliding_layers_are_refused(tmp_path, fields, said):
    qwen = family("qwen2", num_key_value_heads=2, use_sliding_window=True, sliding_window=16)
    value = json.dumps(next(iter(fields.values())))
    assert refused(tmp_path, **qwen, **fields) == (
        f"model.hf_path=DIR: config.json: {said} must give a sliding window to all 4 layers, to "
        f"every other one from the first on, or to none; it is {value}. Use another model."
    )


def test_incomplete_rope_scaling(tmp_path):
    assert refused(tmp_path, rope_scaling={"rope_type": "llama3", "factor": 8.0}) == (
        "model.hf_path=DIR: config.json: rope type llama3 needs low_freq_factor, high_freq_factor; "
        "config.json lacks it. Fix config.json."
    )


def test_shapes_that_contradict_each_other(tmp_path):
    assert refused(tmp_path, num_key_value_heads=3) == (
        "model.hf_path=DIR: config.json gives model.num_query_groups=3: must divide "
        "model.num_attention_heads=8. Use a divisor. Fix config.json."
    )
    assert refused(tmp_path, rms_norm_eps="tiny").startswith(
        "model.hf_path=DIR: config.json gives norm_eps=tiny: "
    )


def test_heads(tmp_path):
    def head(**fields):
        return head_of_hf_config(LLAMA | fields, where="W")

    assert head() == "causal_lm"
    assert head(architectures=None) == "causal_lm"
    one = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    assert head(**one) == "sequence_classification"
    with pytest.raises(ValueError, match="W: a classification head must have one label; .*=2"):
        head(architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ValueError, match="num_labels=3"):
        head(**one | {"id2label": {"0": "a", "1": "b", "2": "c"}})
    for other in ("LlamaModel", "LlamaForTokenClassification", "GemmaForCausalLM"):
        with pytest.raises(ValueError, match="one class of LlamaForCausalLM, LlamaForSequence"):
            head(architectures=[other])
