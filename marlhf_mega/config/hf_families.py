"""Defaults of each Hugging Face architecture for config.json, and what it implies."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from marlhf_mega.config.model import Architecture

HfHead = Literal["causal_lm", "sequence_classification"]
"""What transformers calls the two heads; `sequence_classification` gives one number."""

_CLASS_SUFFIX: dict[HfHead, str] = {
    "causal_lm": "ForCausalLM",
    "sequence_classification": "ForSequenceClassification",
}
COMMON_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "sliding_window": None,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture of Hugging Face transformers."""

    prefix: str
    """Prefix of its class names."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of absent config.json fields, where they differ from `COMMON_DEFAULTS`."""
    neutral: Mapping[str, Any] = field(default_factory=dict)
    """Fields that must be absent, null or have this value."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """`ModelConfig` fields that the architecture determines."""
    window: Literal["never", "always", "switched", "alternating"] = "never"
    """Which layers have a sliding window: none, all, those that `use_sliding_window` and
    `max_window_layers` select, or every other one."""


_NO_BIAS = {"attention_bias": False}
_CAUSAL = {"use_bidirectional_attention": False}
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_GEMMA = {"zero_centered_norm": True, "embedding_scale": True}
FAMILIES: dict[Architecture, Family] = {
    "llama": Family(prefix="Llama", neutral=_NO_BIAS | {"mlp_bias": False}),
    "mistral": Family(
        prefix="Mistral",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        window="always",
    ),
    "qwen2": Family(
        prefix="Qwen2",
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        constants={"qkv_bias": True},
        window="switched",
    ),
    "qwen3": Family(
        prefix="Qwen3",
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        neutral=_NO_BIAS,
        constants={"qk_norm": True},
        window="switched",
    ),
    "gemma": Family(
        prefix="Gemma",
        defaults={
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        neutral=_NO_BIAS | _CAUSAL,
        constants=_GEMMA,
    ),
    "gemma2": Family(
        prefix="Gemma2",
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "query_pre_attn_scalar": 256,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        neutral=_NO_BIAS | _CAUSAL,
        constants=_GEMMA | {"post_norms": True},
        window="alternating",
    ),
    "mixtral": Family(
        prefix="Mixtral",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        window="always",
    ),
    "qwen2_moe": Family(
        prefix="Qwen2Moe",
        defaults={
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
            "qkv_bias": True,
        },
        neutral=_ALL_SPARSE | {"use_sliding_window": False},
    ),
    "qwen3_moe": Family(
        prefix="Qwen3Moe",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        neutral=_NO_BIAS | _ALL_SPARSE | {"use_sliding_window": False},
        constants={"qk_norm": True},
    ),
}
assert set(FAMILIES) == set(get_args(Architecture))


def class_name(architecture: Architecture, head: HfHead) -> str:
    """Return the transformers class, such as `LlamaForCausalLM`."""
    return FAMILIES[architecture].prefix + _CLASS_SUFFIX[head]
