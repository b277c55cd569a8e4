"""FP8 keys against every FP8 field of Megatron-Core's three configs, recipe by recipe.

Where each rule stands in Megatron-Core, the same in 0.16 and 0.19:
- fp8, fp8_recipe, fp8_param: `TransformerConfig`; the last only with `fp8` (`__post_init__`). The
  context that reads them is `fp8_utils.get_fp8_context`: `fp8_param` makes the weights FP8.
- first_last_layers_bf16 and its two counts: not with delayed scaling, and no more than the layers
  of a pipeline stage (`TransformerConfig.__post_init__`); `fp8_utils.is_first_last_bf16_layer`.
- fp8_param_gather: what `fp8_param` made has buffers of its own kind
  (`DistributedDataParallelConfig`, `_ParamAndGradBuffer`).
- reuse_grad_buf_for_mxfp8_param_ag: only mxfp8, only with fp8_param_gather
  (`DistributedDataParallelConfig.__post_init__`), in the optimizer's config too: without it
  `OptimizerConfig.__post_init__` warns that mxfp8 takes much memory.
- fp8_recipe of the optimizer: "the processing logic inside distributed optimizer"
  (`OptimizerConfig`).
- CUDA graphs stay off: enable_cuda_graph, external_cuda_graph, cuda_graph_impl.
- alignment: `fp8_utils.get_fp8_align_size`.
- which GPU: `check_fp8_support` and its siblings in Transformer Engine; see test_device.py.
"""

import dataclasses
from functools import partial

import pytest
import torch

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.sections.hardware import PrecisionConfig
from marlhf_mega.config.sections.training import OptimizerConfig
from marlhf_mega.models.spec import (
    TransformerConfig,
    _unfused_engine_spec,
    fp8_settings,
)
from marlhf_mega.models.train_state import ddp_config, optimizer_config

# Recipe, weights in FP8, bfloat16 layers at either end.
CASES = {
    "tensorwise": ("tensorwise", False, 0),
    "tensorwise, weights": ("tensorwise", True, 0),
    "tensorwise, edges": ("tensorwise", False, 1),
    "delayed": ("delayed", False, 0),
    "delayed, weights": ("delayed", True, 0),
    "blockwise": ("blockwise", False, 0),
    "blockwise, weights and edges": ("blockwise", True, 2),
    "mxfp8": ("mxfp8", False, 0),
    "mxfp8, weights": ("mxfp8", True, 0),
    "mxfp8, weights and edges": ("mxfp8", True, 1),
}
# Fields of (the model, data parallelism, the optimizer) that a case sets; all others about FP8
# have Megatron-Core's defaults.
TABLE = {
    "tensorwise": ({}, {}, {}),
    "tensorwise, weights": ({"fp8_param": True}, {"fp8_param_gather": True}, {}),
    "tensorwise, edges": (
        {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 1,
            "num_layers_at_end_in_bf16": 1,
        },
        {},
        {},
    ),
    "delayed": ({}, {}, {}),
    "delayed, weights": ({"fp8_param": True}, {"fp8_param_gather": True}, {}),
    "blockwise": ({}, {}, {}),
    "blockwise, weights and edges": (
        {
            "fp8_param": True,
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 2,
            "num_layers_at_end_in_bf16": 2,
        },
        {"fp8_param_gather": True},
        {},
    ),
    "mxfp8": ({}, {}, {}),
    "mxfp8, weights": (
        {"fp8_param": True},
        {"fp8_param_gather": True, "reuse_grad_buf_for_mxfp8_param_ag": True},
        {"reuse_grad_buf_for_mxfp8_param_ag": True},
    ),
    "mxfp8, weights and edges": (
        {
            "fp8_param": True,
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 1,
            "num_layers_at_end_in_bf16": 1,
        },
        {"fp8_param_gather": True, "reuse_grad_buf_for_mxfp8_param_ag": True},
        {"reuse_grad_buf_for_mxfp8_param_ag": True},
    ),
}
ALIGNMENTS = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
ABOUT_FP8 = ("fp8", "in_bf16", "layers_bf16", "amax", "fp4", "cuda_graph", "quantiz")


def built(precision):
    return TransformerConfig(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        **fp8_settings(precision),
    )


def about_fp8(config):
    """Fields whose value counts, and what they are by default."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if any(word in field.name for word in ABOUT_FP8)
    }


@pytest.mark.parametrize("number_format", ["hybrid", "e4m3"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:mxfp8 without")
def test_every_field_of_every_recipe(case, number_format):
    recipe, gather, edge = CASES[case]
    precision = PrecisionConfig(
        fp8=number_format,
        fp8_recipe=recipe,
        fp8_param_gather=gather,
        fp8_edge_layers_bf16=edge,
    )
    model = built(precision)
    found = (model, ddp_config(model), optimizer_config(OptimizerConfig(), model))
    plain = built(PrecisionConfig())
    defaults = (plain, ddp_config(plain), optimizer_config(OptimizerConfig(), plain))
    always = (
        {
            "fp8": number_format,
            "fp8_recipe": recipe,
            "num_layers_at_start_in_bf16": 0,
            "num_layers_at_end_in_bf16": 0,
        },
        {},
        {"fp8_recipe": recipe},
    )
    for config, default, common, row in zip(found, defaults, always, TABLE[case], strict=True):
        assert about_fp8(config) == about_fp8(default) | common | row


def test_no_fp8_field_is_set_without_fp8():
    precision = PrecisionConfig(fp8_param_gather=True, fp8_edge_layers_bf16=1)
    model = built(precision)
    ddp, adam = ddp_config(model), optimizer_config(OptimizerConfig(), model)
    assert (model.fp8, model.fp8_param, model.first_last_layers_bf16) == (None, False, False)
    assert (ddp.fp8_param_gather, adam.fp8_recipe) == (False, None)
    assert precision.fp8_alignment == 1


@pytest.mark.parametrize("recipe", ALIGNMENTS)
def test_the_alignment_is_that_of_megatron(recipe):
    from megatron.core.enums import Fp8Recipe
    from megatron.core.fp8_utils import get_fp8_align_size

    precision = PrecisionConfig(fp8="hybrid", fp8_recipe=recipe)
    assert precision.fp8_alignment == ALIGNMENTS[recipe] == get_fp8_align_size(Fp8Recipe(recipe))


def test_untrained_models_use_fp8_only_when_asked():
    learns = PrecisionConfig(fp8="hybrid", fp8_param_gather=True)
    assert learns.frozen().fp8 == "off"
    asked = learns.model_copy(update={"fp8_frozen": True}).frozen()
    assert (asked.fp8, asked.fp8_param_gather) == ("hybrid", False)


def test_with_adapters_norms_are_apart_from_projections():
    """Adapters read what a norm has made, which Transformer Engine's fused modules keep inside."""
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TELayerNormColumnParallelLinear,
        TENorm,
    )

    apart = _unfused_engine_spec(ModelConfig())
    attention = apart.submodules.self_attention.submodules
    assert attention.linear_qkv is TEColumnParallelLinear
    assert attention.linear_qkv is not TELayerNormColumnParallelLinear
    mlp = apart.submodules.mlp
    # Megatron 0.19 gives a partial, 0.16 a ModuleSpec.
    parts = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
    assert parts.linear_fc1 is TEColumnParallelLinear
    assert apart.submodules.input_layernorm is apart.submodules.pre_mlp_layernorm is TENorm
    # Checkpoints name norms as in the fused modules.
    assert apart.submodules.sharded_state_dict_keys_map == {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
