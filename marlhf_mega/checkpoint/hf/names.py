"""Which Hugging Face tensors make up a Megatron-Core parameter: one table per architecture."""

from dataclasses import dataclass
from typing import Literal

from marlhf_mega.config.hf_families import HfHead
from marlhf_mega.config.model import ModelConfig

Kind = Literal["replicated", "vocab", "qkv", "gate_up", "row_parallel"]
"""How tensor-parallel ranks share the parameter."""


@dataclass(frozen=True)
class Entry:
    """One Megatron-Core parameter: the Hugging Face tensors that are fused into it."""

    kind: Kind
    tensors: dict[str, tuple[str, ...]]
    """Name within the layer -> symbolic shape, see `WeightTable`; `{e}` is the expert's number."""


def _norm(name: str, size: str = "hidden") -> Entry:
    return Entry("replicated", {f"{name}.weight": (size,)})


def _gate_up(gate: str, up: str, width: str) -> Entry:
    return Entry("gate_up", {f"{n}.weight": (width, "hidden") for n in (gate, up)})


def _row_parallel(name: str, width: str) -> Entry:
    return Entry("row_parallel", {f"{name}.weight": ("hidden", width)})


_QKV = {"self_attn.q_proj": "query", "self_attn.k_proj": "key", "self_attn.v_proj": "key"}
_ATTENTION = {
    "input_layernorm.weight": _norm("input_layernorm"),
    "self_attention.linear_qkv.weight": Entry(
        "qkv", {f"{name}.weight": (size, "hidden") for name, size in _QKV.items()}
    ),
    "self_attention.linear_proj.weight": _row_parallel("self_attn.o_proj", "query"),
}
_QKV_BIAS = {
    "self_attention.linear_qkv.bias": Entry(
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
    "mlp.linear_fc2.weight": _row_parallel("mlp.down_proj", "ffn"),
}
_MIXTRAL_EXPERTS = {
    "mlp.router.weight": Entry(
        "replicated", {"block_sparse_moe.gate.weight": ("experts", "hidden")}
    ),
    "mlp.experts.linear_fc1.weight": _gate_up(
        "block_sparse_moe.experts.{e}.w1", "block_sparse_moe.experts.{e}.w3", "expert_ffn"
    ),
    "mlp.experts.linear_fc2.weight": _row_parallel("block_sparse_moe.experts.{e}.w2", "expert_ffn"),
}
_QWEN_EXPERTS = {
    "mlp.router.weight": Entry("replicated", {"mlp.gate.weight": ("experts", "hidden")}),
    "mlp.experts.linear_fc1.weight": _gate_up(
        "mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "expert_ffn"
    ),
    "mlp.experts.linear_fc2.weight": _row_parallel("mlp.experts.{e}.down_proj", "expert_ffn"),
}
_SHARED_EXPERT = {
    "mlp.shared_experts.linear_fc1.weight": _gate_up(
        "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "shared_ffn"
    ),
    "mlp.shared_experts.linear_fc2.weight": _row_parallel(
        "mlp.shared_expert.down_proj", "shared_ffn"
    ),
    "mlp.shared_experts.gate_weight": Entry(
        "replicated", {"mlp.shared_expert_gate.weight": ("one", "hidden")}
    ),
}
EMBEDDING = Entry("vocab", {"model.embed_tokens.weight": ("vocab", "hidden")})
_LM_HEAD = Entry("vocab", {"lm_head.weight": ("vocab", "hidden")})
_SCALAR_HEAD = Entry("replicated", {"score.weight": ("one", "hidden")})


def model_entries(config: ModelConfig, head: HfHead) -> dict[str, Entry]:
    """Return the entries of parameters outside the layers, by their names."""
    output = EMBEDDING if config.tied_embeddings else _LM_HEAD
    return {
        "embedding.word_embeddings.weight": EMBEDDING,
        "decoder.final_layernorm.weight": _norm("model.norm"),
        "output_layer.weight": output if head == "causal_lm" else _SCALAR_HEAD,
    }


def layer_entries(config: ModelConfig) -> dict[str, Entry]:
    """Return the entries of one layer's parameters, by their names in Megatron's local spec."""
    entries = dict(_ATTENTION)
    if config.qkv_bias:
        entries |= _QKV_BIAS
    if config.qk_norm:
        entries |= _QK_NORM
    entries |= _GEMMA2_NORMS if config.post_norms else _PRE_MLP_NORM
    if config.num_experts is None:
        entries |= _DENSE_MLP
    else:
        entries |= _MIXTRAL_EXPERTS if config.architecture == "mixtral" else _QWEN_EXPERTS
    if config.shared_expert_ffn_hidden_size is not None:
        entries |= _SHARED_EXPERT
    return entries
