"""The parts of a transformer layer around attention, as they train or in as few calls as it takes.

A decode step is many small operations: on a CPU the calls of the training modules take longer than
what they compute.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import NoneType
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from marlhf_mega.models.layers import PostNormRowParallelLinear
from marlhf_mega.models.lora import adapted

Rotation = Callable[[Tensor], Tensor]
"""Turns heads [seq, batch, groups, heads, head_dim] by the angles of their positions."""


def decoder_layer(layer: Any, config: TransformerConfig) -> "ModuleLayer":
    """Choose how to run a layer of the model; inside `generating` only."""
    on_cpu = layer.self_attention.linear_qkv.weight.device.type == "cpu"
    kind = DirectLayer if on_cpu and _has_whole_groups(config) else ModuleLayer
    return kind(layer, config)


def _has_whole_groups(config: TransformerConfig) -> bool:
    """With fewer groups than ranks a rank's rows are not those of whole groups."""
    assert config.num_query_groups is not None
    return config.num_query_groups >= config.tensor_model_parallel_size


class ModuleLayer:
    """All of a layer but attention, by the modules that train.

    Hidden states are [seq, batch, hidden].
    """

    def __init__(self, layer: Any, config: TransformerConfig) -> None:
        """Take a layer of the model."""
        assert config.kv_channels is not None
        self.layer, self.config = layer, config
        attention, self.mlp = layer.self_attention, layer.mlp
        self.norm, self.mlp_norm = layer.input_layernorm, layer.pre_mlp_layernorm
        self.head_norms = attention.q_layernorm, attention.k_layernorm
        self.qkv, self.projection = attention.linear_qkv, attention.linear_proj
        self.heads_shape = (attention.num_query_groups_per_partition, -1, config.kv_channels)
        self.has_whole_groups = _has_whole_groups(config)
        self.activation = config.activation_func
        self.is_dense = isinstance(self.mlp, MLP)

    def query_key_value(self, hidden: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, project, rotate.

        Returns:
            query [seq, batch, groups, heads per group, head_dim]; key and value [seq, batch,
            groups, head_dim].
        """
        with self._precision():
            normed = self.norm(hidden)
            if not self.has_whole_groups:
                return self._shared_group(normed, rotate)
            # Every group's rows are those of its queries, its key, its value.
            mixed = self._columns(self.qkv, normed).unflatten(2, self.heads_shape)
            turning, value = mixed[..., :-1, :], mixed[..., -1, :]
            query_norm, key_norm = self.head_norms
            if not isinstance(query_norm, IdentityOp | NoneType):
                query, key = turning[..., :-1, :], turning[..., -1:, :]
                turning = torch.cat((query_norm(query), key_norm(key)), dim=-2)
        turned = rotate(turning)
        return turned[..., :-1, :], turned[..., -1, :], value

    def _shared_group(self, normed: Tensor, rotate: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Do it for a rank whose group others have queries of, too."""
        attention = self.layer.self_attention
        query, key, value = attention.get_query_key_value_tensors(normed, None)
        query = query.unflatten(2, (key.shape[2], -1))
        return rotate(query), rotate(key[..., None, :])[..., 0, :], value

    def add_attention(self, hidden: Tensor, context: Tensor) -> Tensor:
        """Add the projection of what attention read, [seq, batch, heads * head_dim]."""
        with self._precision():
            return self._rows(self.projection, context).add_(hidden)

    def add_mlp(self, hidden: Tensor) -> Tensor:
        """Add the feed-forward part."""
        with self._precision():
            normed = self.mlp_norm(hidden)
            if not self.is_dense:
                mixed: Tensor = self.mlp(normed)[0]
                return mixed + hidden
            gate, up = self._columns(self.mlp.linear_fc1, normed).chunk(2, dim=-1)
            return self._rows(self.mlp.linear_fc2, self.activation(gate).mul_(up)).add_(hidden)

    def _columns(self, linear: Any, normed: Tensor) -> Tensor:
        """Project to this rank's share of the outputs."""
        output: Tensor = linear(normed)[0]
        return output

    def _rows(self, linear: Any, inputs: Tensor) -> Tensor:
        """Project this rank's share of the inputs; sum over the ranks."""
        output: Tensor = linear(inputs)[0]
        return output

    def _precision(self) -> AbstractContextManager[None]:
        """Return FP8 as it trains; but delayed scaling would count these passes in its history."""
        if self.config.fp8_recipe == "delayed":
            return nullcontext()
        context: AbstractContextManager[None] = get_fp8_context(
            self.config, self.layer.layer_number - 1
        )
        return context


class DirectLayer(ModuleLayer):
    """A `ModuleLayer` by the products that `prepacked_projections` gave it, with fewer calls."""

    def _columns(self, linear: Any, normed: Tensor) -> Tensor:
        return adapted(linear, _product(linear, normed), normed)

    def _rows(self, linear: Any, inputs: Tensor) -> Tensor:
        output = _product(linear, inputs)
        if linear.tp_group.size() > 1:
            output = reduce_from_tensor_model_parallel_region(output, linear.tp_group)
        output = adapted(linear, output, inputs)
        if isinstance(linear, PostNormRowParallelLinear):
            output = linear.post_norm(output)
        return output

    def _precision(self) -> AbstractContextManager[None]:
        return nullcontext()


def _product(linear: Any, rows: Tensor) -> Tensor:
    product: Tensor = linear._forward_impl(input=rows, weight=linear.weight, bias=linear.bias)
    return product
