"""The parts of a transformer layer around attention, as they train or in as few calls as it takes.

A decode step is many small operations: on a CPU the calls of the training modules take longer than
what they compute.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from marlhf_mega.models.layers import PostNormRowParallelLinear
from marlhf_mega.models.lora import adapted

Rotation = Callable[[Tensor], Tensor]
"""Turns heads [seq, batch, groups, heads, head_dim] by the angles of their positions."""


def decoder_layer(layer: Any, config: TransformerConfig) -> "ModuleLayer | DirectLayer":
    """Choose how to run a layer of the model; inside `generating` only."""
    on_cpu = layer.self_attention.linear_qkv.weight.device.type == "cpu"
    groups = config.num_query_groups
    assert groups is not None
    # With fewer groups than ranks a rank's rows are not those of whole groups.
    if on_cpu and groups >= config.tensor_model_parallel_size:
        return DirectLayer(layer, config)
    return ModuleLayer(layer, config)


class ModuleLayer:
    """All of a layer but attention, by the modules that train.

    Hidden states are [seq, batch, hidden].
    """

    def __init__(self, layer: Any, config: TransformerConfig) -> None:
        """Take a layer of the model."""
        self.layer, self.config = layer, config

    def query_key_value(self, hidden: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, project, rotate.

        Returns:
            query [seq, batch, groups, heads per group, head_dim]; key and value [seq, batch,
            groups, head_dim].
        """
        with self._precision():
            normed = self.layer.input_layernorm(hidden)
            query, key, value = self.layer.self_attention.get_query_key_value_tensors(normed, None)
        query = query.unflatten(2, (key.shape[2], -1))
        return rotate(query), rotate(key[..., None, :])[..., 0, :], value

    def add_attention(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Add the projection of what attention read, [seq, batch, heads * head_dim]."""
        with self._precision():
            return hidden + self.layer.self_attention.linear_proj(context)[0]

    def add_mlp(self, hidden: Tensor) -> Tensor:
        """Add the feed-forward part."""
        with self._precision():
            return hidden + self.layer.mlp(self.layer.pre_mlp_layernorm(hidden))[0]

    def _precision(self) -> AbstractContextManager[None]:
        """Return FP8 as it trains; but delayed scaling would count these passes in its history."""
        if self.config.fp8_recipe == "delayed":
            return nullcontext()
        context: AbstractContextManager[None] = get_fp8_context(
            self.config, self.layer.layer_number - 1
        )
        return context


class DirectLayer:
    """A `ModuleLayer` by the products that `prepacked_projections` gave it, with fewer calls."""

    def __init__(self, layer: Any, config: TransformerConfig) -> None:
        """Take a layer of the model."""
        assert config.kv_channels is not None
        attention, self.mlp = layer.self_attention, layer.mlp
        self.norm, self.mlp_norm = layer.input_layernorm, layer.pre_mlp_layernorm
        self.query_norm, self.key_norm = attention.q_layernorm, attention.k_layernorm
        self.qkv, self.projection = attention.linear_qkv, attention.linear_proj
        self.heads_shape = (attention.num_query_groups_per_partition, -1, config.kv_channels)
        self.activation = config.activation_func
        self.is_dense = isinstance(self.mlp, MLP)

    def query_key_value(self, hidden: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """See `ModuleLayer`."""
        # Every group's rows are those of its queries, its key, its value.
        mixed = _adapted_product(self.qkv, self.norm(hidden)).unflatten(2, self.heads_shape)
        turning = mixed[..., :-1, :]
        if self.query_norm is not None:
            query, key = turning[..., :-1, :], turning[..., -1:, :]
            turning = torch.cat((self.query_norm(query), self.key_norm(key)), dim=-2)
        turned = rotate(turning)
        return turned[..., :-1, :], turned[..., -1, :], mixed[..., -1, :]

    def add_attention(self, hidden: Tensor, context: Tensor) -> Tensor:
        """See `ModuleLayer`."""
        return _sum_over_ranks(self.projection, context).add_(hidden)

    def add_mlp(self, hidden: Tensor) -> Tensor:
        """See `ModuleLayer`."""
        normed = self.mlp_norm(hidden)
        if not self.is_dense:
            mixed: Tensor = self.mlp(normed)[0]
            return mixed + hidden
        gate, up = _adapted_product(self.mlp.linear_fc1, normed).chunk(2, dim=-1)
        return _sum_over_ranks(self.mlp.linear_fc2, self.activation(gate).mul_(up)).add_(hidden)


def _product(linear: Any, rows: Tensor) -> Tensor:
    product: Tensor = linear._forward_impl(input=rows, weight=linear.weight, bias=linear.bias)
    return product


def _adapted_product(linear: Any, rows: Tensor) -> Tensor:
    return adapted(linear, _product(linear, rows), rows)


def _sum_over_ranks(linear: Any, rows: Tensor) -> Tensor:
    output = _product(linear, rows)
    if linear.tp_group.size() > 1:
        output = reduce_from_tensor_model_parallel_region(output, linear.tp_group)
    output = adapted(linear, output, rows)
    if isinstance(linear, PostNormRowParallelLinear):
        output = linear.post_norm(output)
    return output
