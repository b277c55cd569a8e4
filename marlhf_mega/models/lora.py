"""Low-rank adapters (LoRA) on the parallel projections, of either layer spec.

An adapter adds `scale * B (A x)` to the output W x of a projection. Megatron-Core fuses several of
Hugging Face's projections into one matrix; each of those has an A and a B of its own here, stacked
in the same order. The small product in the middle is what ranks exchange:

    outputs sharded   A whole on every rank, B sharded like W; A x is copied, or gathered along
                      the sequence with sequence parallelism
    inputs sharded    A sharded like W, B whole on every rank; A x is summed, and scattered along
                      the sequence with sequence parallelism

The half that is whole on every rank sees only a share of the sequence with sequence parallelism:
like a norm's weight it is marked, and its gradient is summed over the tensor-parallel ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from marlhf_mega.config.lora import FUSED
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.models.adapter_dropout import InputDropout
from marlhf_mega.parallel.linear import linear
from marlhf_mega.parallel.mesh import Group, Mesh

NAME = "lora"
"""Name of an adapter inside its projection."""
_INPUTS_SHARDED = ("self_attention.linear_proj", "mlp.linear_fc2")


class Adapter(nn.Module):
    """The adapters of the projections that are fused in one matrix."""

    def __init__(self, layer: Any, projection: str, model: ModelConfig, mesh: Mesh) -> None:
        """Allocate both halves; B is zero.

        Args:
            layer: that its projection belongs to.
            projection: its name inside the layer.
            model: with `lora` on.
            mesh: this rank's mesh.
        """
        super().__init__()
        lora, weight = model.lora, layer.get_submodule(projection).weight
        rows, columns = weight.shape
        count = len(lora.adapted(projection))
        self.scale, self.group = lora.scale, mesh.groups.tp
        self.tp_rank, self.tp_size = mesh.tp_rank, mesh.tp_size
        self.inputs_sharded = projection in _INPUTS_SHARDED
        self.sequence_parallel = mesh.parallel.sequence_parallel
        """Switched off while the model generates, as in every module."""
        self.is_on = True
        self.a = nn.Parameter(weight.new_empty(count * lora.size, columns))
        self.b = nn.Parameter(weight.new_zeros(rows, lora.size))
        sharded, whole, dim = (self.a, self.b, 1) if self.inputs_sharded else (self.b, self.a, 0)
        set_tensor_model_parallel_attributes(sharded, True, dim, 1)
        whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self.hook: RemovableHandle | None = None
        chosen = _chosen(projection, model, mesh).to(weight.device, weight.dtype)
        self.register_buffer("chosen", chosen, persistent=False)
        self.dropout: InputDropout | None = None
        if lora.dropout:
            first = mesh.tp_rank * columns if self.inputs_sharded else 0
            features = range(first, first + columns)
            self.dropout = InputDropout(layer, projection, lora, features)

    chosen: Tensor
    """[rows or 1, adapters, 1]: 1 where a row of the output belongs to an adapter, else 0."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what to add to the projection's output, before any norm of that."""
        scale = self.scale
        if self.dropout is not None and self.dropout.is_on:
            cut = self.sequence_parallel and not self.inputs_sharded
            part, parts = (self.tp_rank, self.tp_size) if cut else (0, 1)
            hidden = self.dropout.drop(hidden, part=part, parts=parts)
            scale *= self.dropout.factor
        inner = _product(hidden, self.a) * scale
        if self.tp_size > 1:
            inner = self._exchange(inner)
        return _product(inner, self._spread_b())

    def _exchange(self, inner: Tensor) -> Tensor:
        if self.inputs_sharded:
            if self.sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(inner, self.group)
            return reduce_from_tensor_model_parallel_region(inner, self.group)
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(inner, group=self.group)
        return copy_to_tensor_model_parallel_region(inner, self.group)

    def _spread_b(self) -> Tensor:
        """Return B as a matrix over the stacked outputs of A, [rows, adapters * rank]."""
        return (self.b[:, None] * self.chosen).flatten(1)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """Return float32 W + scale * B A, the same at every layout.

        Element by element and rank by rank: a matrix product would round differently for shards.
        """
        total = weight.float()
        spread, a = self._spread_b().float() * self.scale, self.a.float()
        delta = torch.zeros_like(total)
        for k in range(a.shape[0]):
            delta += spread[:, k : k + 1] * a[k]
        return total + delta


def attach(chunk: Any, mesh: Mesh) -> None:
    """Give a chunk's projections the adapters of its model, with A not yet filled."""
    for layer in chunk.decoder.layers:
        for projection in FUSED:
            if chunk.model.lora.adapted(projection):
                target = layer.get_submodule(projection)
                adapter = Adapter(layer, projection, chunk.model, mesh)
                target.add_module(NAME, adapter)
                # A projection with a norm adds it before that norm.
                if not hasattr(target, "post_norm"):
                    adapter.hook = target.register_forward_hook(_add)
    chunk.has_adapters = True


def freeze_others(chunk: Any) -> None:
    """Let only adapters and a scalar head learn."""
    chunk.requires_grad_(False)
    for adapter in adapters_of([chunk]):
        adapter.requires_grad_(True)
    if chunk.post_process and chunk.head == "scalar":
        chunk.output_layer.requires_grad_(True)


def merge_for_good(chunks: Sequence[Any]) -> None:
    """Add what the adapters learned to the weights, and take the adapters away."""
    merge(chunks)
    for adapter, layer in _pairs(chunks):
        if adapter.hook is not None:
            adapter.hook.remove()
        if adapter.dropout is not None:
            adapter.dropout.remove()
        delattr(layer, NAME)
    for chunk in chunks:
        chunk.has_adapters = False


def adapter_state_dict(layer: Any, *, prefix: str, key: str, data_group: Group) -> dict[str, Any]:
    """Describe a transformer layer's adapters for distributed checkpoints.

    Args:
        layer: of the chunk.
        prefix: its name in the chunk.
        key: its name in the whole model.
        data_group: ranks that hold the same shards.
    """
    state: dict[str, Any] = {}
    for name, adapter in layer.named_modules():
        if not isinstance(adapter, Adapter):
            continue
        found = make_sharded_tensors_for_checkpoint(
            {"a": adapter.a, "b": adapter.b},
            f"{key}{name}.",
            {"a": 1} if adapter.inputs_sharded else {"b": 0},
            tp_group=adapter.group,
            dp_cp_group=data_group,
        )
        if name.startswith("mlp.linear_fc1"):
            # A rank's rows are a share of the gates, then a share of the others.
            rows = f"{key}{name}.b"
            found[rows] = apply_swiglu_sharded_factory(found[rows], ())
        state |= {prefix + whole.removeprefix(key): piece for whole, piece in found.items()}
    return state


def adapted(layer: Any, output: Tensor, hidden: Tensor) -> Tensor:
    """Return a projection's output with what its adapter adds, if it has one that is on."""
    adapter: Adapter | None = getattr(layer, NAME, None)
    return output if adapter is None or not adapter.is_on else output + adapter(hidden)


@contextmanager
def without_adapters(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Compute with the frozen weights alone inside a `with` block."""
    adapters = adapters_of(chunks)
    for adapter in adapters:
        adapter.is_on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.is_on = True


@contextmanager
def merged_adapters(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Merge adapters into the weights inside a `with` block, which reads weights only.

    The weights are kept in host memory meanwhile, so that they come back bit by bit.
    """
    kept = [(layer.weight, layer.weight.detach().cpu().clone()) for _, layer in _pairs(chunks)]
    merge(chunks)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


@torch.no_grad()
def merge(chunks: Sequence[nn.Module]) -> None:
    """Add what the adapters learned to the weights."""
    for adapter, layer in _pairs(chunks):
        layer.weight.copy_(adapter.merged(layer.weight))


def adapters_of(chunks: Sequence[nn.Module]) -> list[Adapter]:
    """Return all adapters of a model's chunks."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapter)]


def _pairs(chunks: Sequence[nn.Module]) -> list[tuple[Adapter, Any]]:
    """Return every adapter with its projection."""
    modules: list[Any] = [module for chunk in chunks for module in chunk.modules()]
    return [(module.lora, module) for module in modules if hasattr(module, NAME)]


def _add(layer: Any, arguments: tuple[Tensor, ...], output: Any) -> Any:
    """Forward hook of a projection, which returns its output and a bias."""
    return adapted(layer, output[0], arguments[0]), *output[1:]


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    return linear(hidden, weight) if hidden.device.type == "cpu" else F.linear(hidden, weight)


def _chosen(projection: str, model: ModelConfig, mesh: Mesh) -> Tensor:
    """Return which adapter every output row of this rank belongs to, see `Adapter.chosen`."""
    rows = [0]
    if projection == "self_attention.linear_qkv":
        # Every group's rows are those of its queries, its key, its value; ranks cut anywhere.
        width, queries = model.kv_channels, model.num_attention_heads // model.query_groups
        whole = ([0] * queries * width + [1] * width + [2] * width) * model.query_groups
        share = len(whole) // mesh.tp_size
        rows = whole[mesh.tp_rank * share : (mesh.tp_rank + 1) * share]
    elif projection == "mlp.linear_fc1":
        share = model.ffn_hidden_size // mesh.tp_size
        rows = [0] * share + [1] * share
    fused = FUSED[projection]
    adapters = [fused.index(name) for name in model.lora.adapted(projection)]
    return (torch.tensor(rows)[:, None] == torch.tensor(adapters))[..., None]
