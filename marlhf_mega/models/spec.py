"""Translate our model configuration to Megatron-Core's transformer config and layer spec."""

from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.tensor_parallel import layers as parallel_layers
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor
from torch.nn import functional as F

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.sections.hardware import MemoryConfig, PrecisionConfig
from marlhf_mega.models.layers import (
    LocalColumnParallelLinear,
    LocalRowParallelLinear,
    PostNormRowParallelLinear,
    RMSNorm,
    SdpaAttention,
)
from marlhf_mega.models.packing import packing_engine
from marlhf_mega.parallel.mesh import Mesh


def compute_dtype(precision: PrecisionConfig, mesh: Mesh) -> torch.dtype:
    """Return the dtype of weights and activations."""
    if precision.dtype == "auto":
        return mesh.platform.default_dtype
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision.dtype]


def uses_transformer_engine(model: ModelConfig, mesh: Mesh) -> bool:
    """Whether Transformer Engine provides the layers: it has neither softcaps nor post norms."""
    return (
        bool(mesh.platform.transformer_engine)
        and not model.post_norms
        and model.attention_softcap is None
    )


def transformer_config(
    model: ModelConfig, precision: PrecisionConfig, mesh: Mesh, memory: MemoryConfig
) -> TransformerConfig:
    """Translate our names to Megatron-Core's."""
    dtype = compute_dtype(precision, mesh)
    pipelined, on_cpu = mesh.pp_size > 1, mesh.platform.name == "cpu"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        layernorm_zero_centered_gamma=model.zero_centered_norm,
        gated_linear_unit=True,
        activation_func=F.silu if model.activation == "silu" else _gelu_tanh,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        softmax_scale=None if model.query_scale is None else model.query_scale**-0.5,
        window_size=None if model.sliding_window is None else (model.sliding_window - 1, 0),
        window_attn_skip_freq=[
            int(layer % model.sliding_window_every == 0) for layer in range(model.num_layers)
        ],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_backend=AttnBackend[precision.attention_backend],
        # Weights are filled by marlhf_mega.checkpoint.weights, the same in every layout.
        perform_initialization=False,
        use_cpu_initialization=on_cpu,
        tensor_model_parallel_size=mesh.tp_size,
        pipeline_model_parallel_size=mesh.pp_size,
        virtual_pipeline_model_parallel_size=mesh.num_chunks if mesh.num_chunks > 1 else None,
        context_parallel_size=mesh.cp_size,
        expert_model_parallel_size=mesh.ep_size,
        expert_tensor_parallel_size=1,
        sequence_parallel=mesh.parallel.sequence_parallel,
        variable_seq_lengths=pipelined,
        # The only dispatcher that supports variable lengths; Megatron checks dense models as well.
        moe_token_dispatcher_type="alltoall",
        # With two virtual stages, batched communication gives wrong gradients.
        overlap_p2p_comm=mesh.num_chunks > 1,
        batch_p2p_comm=mesh.num_chunks == 1,
        # Streams order what is sent and received; the host need not wait for either.
        batch_p2p_sync=False,
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        **fusions(model, mesh),
        **_expert_settings(model, mesh),
        **fp8_settings(precision),
        **_recompute_settings(memory),
    )


def fusions(model: ModelConfig, mesh: Mesh) -> dict[str, bool]:
    """Return which kernels do several operations at once, where there are such."""
    engine = uses_transformer_engine(model, mesh)
    return {
        # By `platform.eager`. The engine's own (use_te_activation_func) is a module that Megatron
        # 0.16 cannot describe for a checkpoint.
        "bias_activation_fusion": model.activation == "silu",
        "apply_rope_fusion": engine,
        # Products add weight gradients to the buffer that is reduced. Frozen weights have none.
        "gradient_accumulation_fusion": not model.lora.is_on and (engine or apex_accumulates()),
    }


def apex_accumulates() -> bool:
    """Whether NVIDIA's apex adds gradients up where Transformer Engine provides no layers."""
    found: bool = parallel_layers._grad_accum_fusion_available
    return found


def engine_attends(model: ModelConfig, mesh: Mesh, dtype: torch.dtype) -> bool:
    """Whether Transformer Engine's attention fits: its ring has no float32 and no windows."""
    return mesh.cp_size == 1 or (dtype != torch.float32 and model.sliding_window is None)


def layer_spec(
    model: ModelConfig, mesh: Mesh, dtype: torch.dtype
) -> TransformerBlockSubmodules | ModuleSpec:
    """Choose the modules of a transformer layer for this platform, model and number format."""
    if uses_transformer_engine(model, mesh):
        spec = _unfused_engine_spec(model) if model.lora.is_on else _engine_spec(model)
        attention = spec.submodules.self_attention.submodules
        if engine_attends(model, mesh, dtype):
            attention.core_attention = packing_engine(attention.core_attention)
        else:
            attention.core_attention = _own_attention(model)
        return spec
    return _layer_spec(model, _LocalBackend(model), RMSNorm, _own_attention(model))


def _engine_spec(model: ModelConfig) -> ModuleSpec:
    spec: ModuleSpec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=model.num_experts,
        moe_grouped_gemm=True,
        qk_layernorm=model.qk_norm,
    )
    return spec


def _unfused_engine_spec(model: ModelConfig) -> ModuleSpec:
    """Transformer Engine's layer with norms of their own: adapters read what these give."""

    class Unfused(TESpecProvider):
        def fuse_layernorm_and_linear(self) -> bool:
            return False

    backend = Unfused()
    return _layer_spec(model, backend, backend.layer_norm(rms_norm=True), backend.core_attention())


def block_spec(
    model: ModelConfig, mesh: Mesh, num_layers_here: int, dtype: torch.dtype
) -> TransformerBlockSubmodules | ModuleSpec:
    """Return the spec of one stage chunk: its layers and the class of the final norm."""
    layer = layer_spec(model, mesh, dtype)
    if uses_transformer_engine(model, mesh):
        return layer
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers_here, layer_norm=RMSNorm)


class _LocalBackend(LocalSpecProvider):
    """Megatron's local modules, except for the norm and the projections."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model

    def column_parallel_linear(self) -> type:
        return LocalColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return PostNormRowParallelLinear if self.model.post_norms else LocalRowParallelLinear

    def grouped_mlp_modules(self, *args: bool) -> Any:
        experts = super().grouped_mlp_modules(*args)
        # Megatron 0.19 returns a partial, 0.16 the class and its submodules.
        parts = experts.keywords["submodules"] if isinstance(experts, partial) else experts[1]
        parts.linear_fc1, parts.linear_fc2 = LocalColumnParallelLinear, LocalRowParallelLinear
        return experts


def _layer_spec(model: ModelConfig, backend: Any, norm: Any, core_attention: Any) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=core_attention,
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm if model.qk_norm else IdentityOp,
            k_layernorm=norm if model.qk_norm else IdentityOp,
        ),
    )
    engine = isinstance(backend, TESpecProvider)
    # Checkpoints name these norms as Transformer Engine does, so that both kinds can read them.
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if model.num_experts is None:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(
                backend=backend,
                num_experts=model.num_experts,
                moe_grouped_gemm=engine,
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )


def _own_attention(model: ModelConfig) -> Any:
    return partial(
        SdpaAttention,
        softcap=model.attention_softcap,
        window=model.sliding_window,
        window_every=model.sliding_window_every,
    )


def _gelu_tanh(hidden: Tensor) -> Tensor:
    return F.gelu(hidden, approximate="tanh")


def _expert_settings(model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    if model.num_experts is None:
        return {}
    engine = uses_transformer_engine(model, mesh)
    return {
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.experts_per_token,
        "moe_ffn_hidden_size": model.expert_ffn_hidden_size or model.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.shared_expert_ffn_hidden_size,
        "moe_shared_expert_gate": model.shared_expert_ffn_hidden_size is not None,
        "moe_router_pre_softmax": model.router_softmax_first,
        "moe_router_load_balancing_type": "aux_loss" if model.router_aux_loss_coef else "none",
        "moe_aux_loss_coeff": model.router_aux_loss_coef,
        # One product for all experts. Its kernels sort tokens by counts that stay on the device,
        # so that the host waits once a layer, for the rows of each expert.
        "moe_grouped_gemm": engine,
        "moe_permute_fusion": engine and mesh.platform.name == "cuda",
    }


def fp8_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Translate the FP8 keys to fields of Megatron-Core's transformer config."""
    if precision.fp8 == "off":
        return {}
    edge = precision.fp8_edge_layers_bf16
    return {
        "fp8": precision.fp8,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_param": precision.fp8_param_gather,
        "first_last_layers_bf16": edge > 0,
        "num_layers_at_start_in_bf16": edge,
        "num_layers_at_end_in_bf16": edge,
    }


def _recompute_settings(memory: MemoryConfig) -> dict[str, Any]:
    match memory.recompute:
        case "none":
            return {}
        case "selective":
            return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    # `block`: that many of a chunk's layers, one by one; `uniform`: all, in groups of that many.
    return {
        "recompute_granularity": "full",
        "recompute_method": "block" if memory.recompute_num_layers else "uniform",
        "recompute_num_layers": memory.recompute_num_layers or 1,
    }
