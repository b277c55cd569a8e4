"""Which Hugging Face tensors a Megatron-Core parameter is made of: one table per architecture."""

from dataclasses import dataclass
from typing import Literal

from marlhf_mega.config.hf_families import Head
from marlhf_mega.config.model import ModelConfig

Kind = Literal["replicated", "vocab", "qkv", "gate_up", "row"]


@dataclass(frozen=True)
class Row:
    """One Megatron-Core parameter and the Hugging Face tensors it is fused from."""

    kind: Kind
    tensors: dict[str, tuple[str, ...]]
    """Name within the layer -> symbolic shape, see `WeightTable`; `{e}` is an expert."""


def _norm(name: str, size: str = "hidden") -> Row:
    return Row("replicated", {f"{name}.weight": (size,)})


def _gate_up(gate: str, up: str, width: str) -> Row:
    return Row("gate_up", {f"{n}.weight": (width, "hidden") for n in (gate, up)})


def _row(name: str, width: str) -> Row:
    return Row("row", {f"{name}.weight": ("hidden", width)})


_QKV = {"self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "key"}
_ATTENTION = {
    "input_layernorm.weight": _norm("input_layernorm"),
    "self_attention.linear_qkv.weight": Row(
        "qkv", {f"{name}.weight": (size, "hidden") for name, size in _QKV.items()}
    ),
    "self_attention.linear_proj.weight": _row("self_attn.o_proj", "query"),
}
_QKV_BIAS = {
    "self_attention.linear_qkv.bias": Row(
        "qkv", {f"{name}.bias": (size,) for name, size in _QKV.items()}
    )
}
_QK_NORM = {
    "self_attention.q_layernorm.weight": _norm("self_attn.q_norm", "head"),
    "self_attention.k_layernorm.weight": _norm("self_attn.k_norm", "head"),
}
_PRE_MLP_NORM = {"pre_mlp_layernorm.weight": _norm("post_attention_layernorm")}
_GEMMA2_NORMS = {
    "pre_mlp_layernorm.weight": _norm("pre_feedforward_layernorm"),
    "self_attention.linear_proj.post_norm.weight": _norm("post_attention_layernorm"),
    "mlp.linear_fc2.post_norm.weight": _norm("post_feedforward_layernorm"),
}
_DENSE_MLP = {
    "mlp.linear_fc1.weight": _gate_up("mlp.gate_proj", "mlp.up_proj", "ffn"),
    "mlp.linear_fc2.weight": _row("mlp.down_proj", "ffn"),
}
_MIXTRAL_EXPERTS = {
    "mlp.router.weight": Row("replicated", {"block_sparse_moe.gate.weight": ("experts", "hidden")}),
    "mlp.experts.linear_fc1.weight": _gate_up(
        "block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3", "expert_ffn"
    ),
    "mlp.experts.linear_fc2.weight": _row("block_sparse_moe.experts.{e}.w2", "expert_ffn"),
}
_QWEN_EXPERTS = {
    "mlp.router.weight": Row("replicated", {"mlp.gate.weight": ("experts", "hidden")}),
    "mlp.experts.linear_fc1.weight": _gate_up(
        "mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "expert_ffn"
    ),
    "mlp.experts.linear_fc2.weight": _row("mlp.experts.{e}.down_proj", "expert_ffn"),
}
_SHARED_EXPERT = {
    "mlp.shared_experts.linear_fc1.weight": _gate_up(
        "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "shared_ffn"
    ),
    "mlp.shared_experts.linear_fc2.weight": _row("mlp.shared_expert.down_proj", "shared_ffn"),
    "mlp.shared_experts.gate_weight": Row(
        "replicated", {"mlp.shared_expert_gate.weight": ("one", "hidden")}
    ),
}
EMBEDDING = Row("vocab", {"model.embed_tokens.weight": ("vocab", "hidden")})
_LM_HEAD = Row("vocab", {"lm_head.weight": ("vocab", "hidden")})
_SCALAR_HEAD = Row("replicated", {"score.weight": ("one", "hidden")})


def model_rows(config: ModelConfig, head: Head) -> dict[str, Row]:
    """Return the parameters outside of the layers."""
    output = EMBEDDING if config.tied_embeddings else _LM_HEAD
    return {
        "embedding.word_embeddings.weight": EMBEDDING,
        "decoder.final_layernorm.weight": _norm("model.norm"),
        "output_layer.weight": output if head == "causal_lm" else _SCALAR_HEAD,
    }


def layer_rows(config: ModelConfig) -> dict[str, Row]:
    """Return the parameters of one layer, by the local spec's names within the layer."""
    rows = dict(_ATTENTION)
    if config.qkv_bias:
        rows |= _QKV_BIAS
    if config.qk_norm:
        rows |= _QK_NORM
    rows |= _GEMMA2_NORMS if config.post_norms else _PRE_MLP_NORM
    if config.num_experts is None:
        rows |= _DENSE_MLP
    else:
        rows |= _MIXTRAL_EXPERTS if config.architecture == "mixtral" else _QWEN_EXPERTS
    if config.shared_expert_ffn_hidden_size is not None:
        rows |= _SHARED_EXPERT
    return rows
