"""The parameters of one rank, and which shards of a Hugging Face checkpoint they hold."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from marlhf_mega.checkpoint.hf.table import Layout, Shard, WeightTable
from marlhf_mega.models.fp8 import exact_value
from marlhf_mega.models.lora import NAME

_LAYER = re.compile(r"decoder\.layers\.\d+")
_ADAPTER = re.compile(rf"\.{NAME}\.[ab]$")
LENGTH_HEAD = "output_layer.length_weight"
LATENT_HEAD = "output_layer.latent."
"""Parameters that no Hugging Face model has, of a reward model in training: the one's name, and how
the names of the others begin."""


@dataclass(frozen=True)
class LocalParameter:
    """One parameter of this rank."""

    name: str
    """Its name in the model chunk."""
    layer: int | None
    """Number of its layer in the whole model, from 0; None outside the layers."""
    tensor: Tensor


def local_parameters(chunks: Sequence[nn.Module]) -> list[LocalParameter]:
    """List the parameters of a rank's model chunks with their layer numbers.

    Leaves out adapters and `own_parameters`.

    Args:
        chunks: this rank's chunks, not wrapped for training.
    """
    return [p for p in _parameters(chunks) if not _ADAPTER.search(p.name)]


def adapter_parameters(chunks: Sequence[nn.Module]) -> list[LocalParameter]:
    """List the parameters of the adapters likewise."""
    return [p for p in _parameters(chunks) if _ADAPTER.search(p.name)]


def own_parameters(chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the parameters of a reward model in training that no Hugging Face model has."""
    every = (item for chunk in chunks for item in chunk.named_parameters())
    return {name: tensor for name, tensor in every if is_own(name)}


def is_own(name: str) -> bool:
    """Tell whether a parameter is of a kind that no Hugging Face model has."""
    return name == LENGTH_HEAD or name.startswith(LATENT_HEAD)


def _parameters(chunks: Sequence[nn.Module]) -> list[LocalParameter]:
    found = []
    for chunk in chunks:
        for name, tensor in chunk.named_parameters():
            if is_own(name):
                continue
            match = _LAYER.match(name)
            layer: int | None = None
            if match:
                module = chunk.get_submodule(match[0])
                layer = int(module.layer_number) - 1  # type: ignore[arg-type]
            found.append(LocalParameter(name, layer, exact_value(tensor)))
    return found


def find_shards(
    parameters: Iterable[LocalParameter], table: WeightTable, layout: Layout
) -> list[tuple[LocalParameter, Shard]]:
    """Look every parameter up in the table.

    Raises:
        RuntimeError: a parameter is not in the table or has another shape.
    """
    found = []
    for parameter in parameters:
        shard = table.shard(parameter.name, parameter.layer, layout)
        if tuple(parameter.tensor.shape) != shard.shape:
            raise RuntimeError(
                f"{parameter.name}: must have shape {list(shard.shape)} on this rank; it has "
                f"{list(parameter.tensor.shape)}. Build the model from the same config and layout."
            )
        found.append((parameter, shard))
    return found
