"""The parameters of one rank, and the shards of the checkpoint they hold."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from marlhf_mega.checkpoint.hf.table import Layout, Shard, WeightTable
from marlhf_mega.models.fp8 import exact_value

_LAYER = re.compile(r"decoder\.layers\.\d+")


@dataclass(frozen=True)
class LocalParameter:
    """One parameter of this rank."""

    name: str
    """As its model chunk calls it."""
    layer: int | None
    """Number of its layer in the whole model, from 0; none outside of the layers."""
    tensor: Tensor


def local_parameters(chunks: Sequence[nn.Module]) -> list[LocalParameter]:
    """List the parameters of a rank's model chunks with their global layer numbers.

    Args:
        chunks: unwrapped Megatron-Core GPT models, one per virtual pipeline stage.
    """
    found = []
    for chunk in chunks:
        for name, tensor in chunk.named_parameters():
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
