"""Converts `ModelConfig` to a Hugging Face config.json, for models that were not imported."""

from typing import Any

from marlhf_mega.config.hf import fields_from_hf
from marlhf_mega.config.hf_families import HfHead, class_name
from marlhf_mega.config.model import ModelConfig

_HF_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def hf_config_from_model(
    config: ModelConfig,
    *,
    head: HfHead = "causal_lm",
    dtype: str = "bfloat16",
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
) -> dict[str, Any]:
    """Return the config.json of a model that was not imported from Hugging Face.

    Args:
        config: complete section, with `vocab_size`.
        head: logits or one scalar (`num_labels` 1).
        dtype: format of the exported weights, such as `bfloat16`.
        bos_token_id: begin-of-sequence token.
        eos_token_id: what ends a response, one token or several.
        pad_token_id: padding token; a scalar head needs it to score several sequences at once.

    Returns:
        The fields, readable by transformers 4.57 and 5.

    Raises:
        ValueError: the architecture cannot represent the model; one line per field.
    """
    if config.vocab_size is None:
        raise ValueError(
            "model.vocab_size: a Hugging Face model needs it; it is not set. Set it or "
            "tokenizer.path."
        )
    hf = _common_hf_fields(config) | _family_hf_fields(config)
    hf |= {
        "architectures": [class_name(config.architecture, head)],
        "torch_dtype": dtype,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if head == "sequence_classification":
        hf |= scalar_head_fields()
    wanted = _meaning(config)
    where = f"model.architecture={config.architecture}"
    written = _meaning(ModelConfig.model_validate(fields_from_hf(hf, where=where)))
    lost = [name for name in wanted if wanted[name] != written.get(name)]
    if lost:
        raise ValueError(
            "\n".join(
                f"model.{name}={wanted[name]}: the Hugging Face architecture {config.architecture} "
                f"always has {written.get(name)}. Change it or model.architecture."
                for name in lost
            )
        )
    return hf


def scalar_head_fields() -> dict[str, Any]:
    """Return the config.json fields for a `*ForSequenceClassification` with one output."""
    return {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def _common_hf_fields(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    rope: dict[str, Any] | None = None
    if scaling.kind != "none":
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        assert rope is not None
        rope |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return {
        "model_type": config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.query_groups,
        "head_dim": config.kv_channels,
        "hidden_act": _HF_ACTIVATIONS[config.activation],
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def _family_hf_fields(config: ModelConfig) -> dict[str, Any]:
    window, layers = config.sliding_window, range(config.num_layers)
    types = [
        "sliding_attention" if window and i % config.sliding_window_every == 0 else "full_attention"
        for i in layers
    ]
    scale = config.query_scale or config.kv_channels
    match config.architecture:
        case "llama":
            return {"attention_bias": False, "mlp_bias": False}
        case "mistral":
            return {"sliding_window": window}
        case "qwen2" | "qwen3":
            return {
                "use_sliding_window": window is not None,
                "sliding_window": window,
                "max_window_layers": config.num_layers,
                "layer_types": types,
            }
        case "gemma":
            return {"hidden_activation": _HF_ACTIVATIONS[config.activation]}
        case "gemma2":
            return {
                "hidden_activation": _HF_ACTIVATIONS[config.activation],
                "query_pre_attn_scalar": int(scale) if scale == int(scale) else scale,
                "attn_logit_softcapping": config.attention_softcap,
                "final_logit_softcapping": config.logits_softcap,
                "sliding_window": window,
                "layer_types": types,
            }
        case "mixtral":
            return {
                "intermediate_size": config.expert_ffn_hidden_size or config.ffn_hidden_size,
                "num_local_experts": config.num_experts,
                "num_experts_per_tok": config.experts_per_token,
                "router_aux_loss_coef": config.router_aux_loss_coef,
                "sliding_window": window,
            }
        case "qwen2_moe" | "qwen3_moe":
            own: dict[str, Any] = {
                "num_experts": config.num_experts,
                "num_experts_per_tok": config.experts_per_token,
                "moe_intermediate_size": config.expert_ffn_hidden_size or config.ffn_hidden_size,
                "norm_topk_prob": not config.router_softmax_first,
                "router_aux_loss_coef": config.router_aux_loss_coef,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "use_sliding_window": False,
            }
            if config.architecture == "qwen2_moe":
                own["qkv_bias"] = config.qkv_bias
                own["shared_expert_intermediate_size"] = config.shared_expert_ffn_hidden_size
            return own


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """Return what the forward pass depends on: derived values filled in, unused fields removed."""
    meaning = config.model_dump(exclude={"hf_path", "init", "lora", "router_aux_loss_coef"})
    meaning |= {
        "num_query_groups": config.query_groups,
        "head_dim": config.kv_channels,
        "query_scale": config.query_scale or float(config.kv_channels),
        "sliding_window_every": config.sliding_window and config.sliding_window_every,
    }
    if config.num_experts:
        meaning["expert_ffn_hidden_size"] = config.expert_ffn_hidden_size or config.ffn_hidden_size
        del meaning["ffn_hidden_size"]
    else:
        for name in ("experts_per_token", "expert_ffn_hidden_size", "router_softmax_first"):
            del meaning[name]
    if config.rope_scaling.kind != "llama3":
        meaning["rope_scaling"] = (config.rope_scaling.kind, config.rope_scaling.factor)
    return meaning
