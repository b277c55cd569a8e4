"""Reshard a model's weights in memory, from the layout it trains at to another one."""

from collections.abc import Sequence

from torch import Tensor

from marlhf_mega.checkpoint.hf.parameters import (
    LocalParameter,
    adapter_parameters,
    find_shards,
    local_parameters,
)
from marlhf_mega.checkpoint.hf.table import Layout, WeightTable
from marlhf_mega.checkpoint.weights import adapter_table_of, layout_of, table_of
from marlhf_mega.config.limits import MOVE_BUCKET_BYTES
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.reshard_plan import Block
from marlhf_mega.parallel.resharder import Resharder


def describe(
    parameters: Sequence[LocalParameter], table: WeightTable, layout: Layout
) -> list[Block]:
    """Return which ranges of which tensors a rank's parameters hold, without padding.

    Args:
        parameters: one rank's parameters.
        table: the weight table of the model.
        layout: the rank's position.
    """
    blocks = []
    for number, (parameter, shard) in enumerate(find_shards(parameters, table, layout)):
        tensor, start = parameter.tensor, 0
        for piece in shard.pieces:
            if piece.name is not None:
                per_index = tensor.numel() // tensor.shape[piece.dim] * tensor.element_size()
                blocks.append(
                    Block(
                        tensor=piece.name,
                        dim=piece.dim,
                        lo=piece.lo,
                        hi=piece.hi,
                        parameter=number,
                        start=start,
                        index_bytes=per_index,
                    )
                )
            start += piece.size
    return blocks


ModelShard = tuple[Sequence[StageModel], Mesh]
"""This rank's chunks of a model, and the mesh that they were built for."""


def connect(
    source: ModelShard | None, target: ModelShard | None, *, bucket_bytes: int = MOVE_BUCKET_BYTES
) -> Resharder:
    """Plan how to fill one model from another of the same shape. All ranks of the launch call it.

    Args:
        source: what this rank sends; None if it has no part of the source.
        target: what this rank receives; None if it has no part of the target.
        bucket_bytes: memory that a move takes besides the weights.
    """
    own = source or target
    assert own is not None, "every rank has a part in one of the models"
    _, mesh = own
    return Resharder(
        described(*source) if source else ([], []),
        described(*target) if target else ([], []),
        mesh.launch,
        mesh.platform,
        bucket_bytes=bucket_bytes,
    )


def connect_learning(source: ModelShard | None, target: ModelShard | None) -> Resharder:
    """Plan the moves of what learns. All ranks of the launch call it.

    Of a model with adapters that is these alone: its frozen weights are moved here, once.
    """
    own = source or target
    assert own is not None, "every rank has a part in one of the models"
    if not own[0][0].has_adapters:
        return connect(source, target)
    connect(source, target).move()
    _, mesh = own
    return Resharder(
        _described_adapters(*source) if source else ([], []),
        _described_adapters(*target) if target else ([], []),
        mesh.launch,
        mesh.platform,
    )


def _described_adapters(
    chunks: Sequence[StageModel], mesh: Mesh
) -> tuple[list[Block], list[Tensor]]:
    parameters = adapter_parameters(chunks)
    blocks = describe(parameters, adapter_table_of(chunks), layout_of(mesh, chunks[0].model))
    return blocks, [parameter.tensor for parameter in parameters]


def described(chunks: Sequence[StageModel], mesh: Mesh) -> tuple[list[Block], list[Tensor]]:
    """Return what a rank holds of a model, and the parameters that hold it."""
    parameters = local_parameters(chunks)
    blocks = describe(parameters, table_of(chunks), layout_of(mesh, chunks[0].model))
    return blocks, [parameter.tensor for parameter in parameters]
