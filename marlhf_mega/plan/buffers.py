"""Memory of a trained model besides activations: weight and gradient buffers, optimizer state.

Megatron-Core's data-parallel wrapper puts the parameters of a chunk into one buffer in reverse
order, each at a multiple of 64 elements. A buffer consists of buckets, each a multiple of
lcm(replicas, 128) elements; dense and expert parameters have separate buffers. With overlap, the
first chunk of the first stage starts a new bucket whenever one is full; other chunks have one
bucket, as their gradients delay no pipeline. The distributed optimizer splits every bucket into
equal shares and keeps state for the parameters in its own share.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from marlhf_mega.config.limits import round_up
from marlhf_mega.plan.layout import WorldLayout
from marlhf_mega.plan.parameters import Parameter

_PARAMETER_MULTIPLE = 64
_BUCKET_MULTIPLE = 128
_BUCKET_SIZE = 40_000_000
_BUCKET_SIZE_PER_REPLICA = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Elements on one rank, padding included."""

    num_elements: int
    """Of the weight buffers, and of the gradient buffers."""
    owned: tuple[int, ...]
    """Parameters whose optimizer state each rank of the pipeline stage keeps."""
    owned_tensors: tuple[int, ...]
    """Tensors that these parameters are parts of."""
    buckets: tuple[int, ...]
    """Elements of each bucket, dense ones first."""


def buffers(
    chunks: Sequence[Sequence[Parameter]],
    layout: WorldLayout,
    *,
    stage: int,
    bucket_size: int | None = None,
) -> Buffers:
    """Lay out a rank's trained parameters.

    Args:
        chunks: the parameters of each of the rank's chunks.
        layout: of the world.
        stage: of the pipeline.
        bucket_size: elements that fill a bucket, with overlap. None means Megatron-Core's
            default.
    """
    if bucket_size is None:
        bucket_size = max(_BUCKET_SIZE, _BUCKET_SIZE_PER_REPLICA * layout.data)
    ranks = layout.world // layout.pipeline
    owned, tensors = [0] * ranks, [0] * ranks
    buckets: list[int] = []
    # Neighbouring ranks share every matrix, or have different experts.
    for is_expert, neighbours in ((False, layout.tensor), (True, layout.expert)):
        for number, chunk in enumerate(chunks):
            full = bucket_size if layout.overlap and stage == number == 0 else math.inf
            for bucket in _buckets([p for p in chunk if p.is_expert == is_expert], full):
                length, real, parts = _shares(bucket, ranks // neighbours)
                buckets.append(length)
                for rank in range(ranks):
                    owned[rank] += real[rank // neighbours]
                    tensors[rank] += parts[rank // neighbours]
    return Buffers(
        num_elements=sum(buckets),
        owned=tuple(owned),
        owned_tensors=tuple(tensors),
        buckets=tuple(buckets),
    )


def _buckets(parameters: Sequence[Parameter], full: float) -> list[list[Parameter]]:
    """Split as the wrapper does: when a bucket is full, and around shared embeddings."""
    found: list[list[Parameter]] = [[]]
    end = 0
    for parameter in reversed(parameters):
        if parameter.is_shared_embedding:
            found += [[parameter], []]
            end = 0
            continue
        found[-1].append(parameter)
        end = round_up(end, _PARAMETER_MULTIPLE) + parameter.size
        if end >= full:
            found.append([])
            end = 0
    return [bucket for bucket in found if bucket]


def _shares(bucket: Sequence[Parameter], replicas: int) -> tuple[int, list[int], list[int]]:
    """Return a bucket's length, and the parameters and tensors in each replica's share."""
    spans, start = [], 0
    for parameter in bucket:
        spans.append((start, start + parameter.size))
        start = round_up(start + parameter.size, _PARAMETER_MULTIPLE)
    length = round_up(start, math.lcm(replicas, _BUCKET_MULTIPLE))
    share = length // replicas
    real, tensors = [0] * replicas, [0] * replicas
    for low, high in spans:
        for replica in range(low // share, (high - 1) // share + 1):
            part = min(high, (replica + 1) * share) - max(low, replica * share)
            real[replica] += part
            tensors[replica] += 1
    return length, real, tensors
