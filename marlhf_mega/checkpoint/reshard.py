"""Carry a model's weights from the layout it trains at to another one, in memory."""

from collections.abc import Sequence

from torch import Tensor

from marlhf_mega.checkpoint.hf.parameters import LocalParameter, find_shards, local_parameters
from marlhf_mega.checkpoint.hf.table import Layout, WeightTable
from marlhf_mega.checkpoint.weights import layout_of
from marlhf_mega.config.limits import MOVE_BUCKET_BYTES
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.transfer import Mover
from marlhf_mega.parallel.transfer_plan import Block


def describe(
    parameters: Sequence[LocalParameter], table: WeightTable, layout: Layout
) -> list[Block]:
    """Say which ranges of which whole tensors a rank's parameters hold; padding is left out.

    Args:
        parameters: of one rank.
        table: of the model.
        layout: where the rank stands.
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


Place = tuple[Sequence[StageModel], Mesh]
"""This rank's chunks of a model and where it stands in their layout."""


def connect(
    source: Place | None, target: Place | None, *, bucket_bytes: int = MOVE_BUCKET_BYTES
) -> Mover:
    """Plan how to fill one model from another of the same shape. All ranks of the launch call it.

    Args:
        source: what this rank gives; none: nothing.
        target: what it is to get; none: nothing.
        bucket_bytes: memory that a move may take besides the weights.
    """
    place = source or target
    assert place is not None, "every rank has a part in one of the models"
    _, mesh = place
    return Mover(
        _described(*source) if source else ([], []),
        _described(*target) if target else ([], []),
        mesh.launch,
        mesh.platform,
        bucket_bytes=bucket_bytes,
    )


def _described(chunks: Sequence[StageModel], mesh: Mesh) -> tuple[list[Block], list[Tensor]]:
    model = chunks[0].model
    assert model.vocab_size is not None
    table = WeightTable(
        model, "causal_lm" if chunks[0].head == "language" else "sequence_classification"
    )
    parameters = local_parameters(chunks)
    blocks = describe(parameters, table, layout_of(mesh, model.vocab_size))
    return blocks, [parameter.tensor for parameter in parameters]
