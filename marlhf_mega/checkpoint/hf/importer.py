"""Fill the parameters of one rank with their slices of a Hugging Face folder."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from marlhf_mega.checkpoint.hf.parameters import LocalParameter, find_shards
from marlhf_mega.checkpoint.hf.reader import HfReader, check_tensors, open_folder
from marlhf_mega.checkpoint.hf.table import Layout, Shard, WeightTable

log = logging.getLogger(__name__)

_HEADS = {"lm_head.weight", "score.weight"}


@dataclass(frozen=True)
class ImportReport:
    """What an import found."""

    num_bytes: int
    """Bytes read by this rank."""
    fresh: tuple[str, ...]
    """Tensors the files do not have and that keep their initial values: a new scalar head."""
    unused: tuple[str, ...]
    """Tensors of the files that the model has no place for."""


def import_weights(
    folder: Path,
    parameters: Iterable[LocalParameter],
    table: WeightTable,
    layout: Layout,
    *,
    key: str = "model.hf_path",
    allow_fresh_head: bool = False,
    broadcast: Callable[[str, Tensor], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> ImportReport:
    """Check a folder against the model, then read this rank's slices, one at a time.

    Nothing is written to a parameter before the whole folder has been checked. Without `broadcast`
    it does not communicate.

    Args:
        folder: a Hugging Face folder with safetensors.
        parameters: what to fill; number formats may differ from the files'.
        table: the correspondence of the model.
        layout: where this rank stands.
        key: which configuration key named the folder.
        allow_fresh_head: whether a scalar head that the folder lacks may keep its initial values.
        broadcast: gives `(name, tensor)` of the first data-parallel replica to the others, which
            then do not read; every rank calls it for every parameter.
        progress: called with the number of bytes after every parameter.

    Returns:
        What was read, left out and not found.

    Raises:
        ValueError: the folder's files are damaged or do not fit the model.
        RuntimeError: a parameter does not have the shape the table gives it.
    """
    reader = open_folder(folder, key=key)
    fresh, unused = _compare(reader, table, allow_fresh_head=allow_fresh_head)
    shards = find_shards(parameters, table, layout)
    num_bytes = 0
    for parameter, shard in shards:
        if fresh and any(piece.name in fresh for piece in shard.pieces):
            continue
        if broadcast is None or shard.is_first_replica:
            count = _fill(parameter.tensor, shard, reader)
            num_bytes += count
            if progress is not None:
                progress(count)
        if broadcast is not None:
            broadcast(parameter.name, parameter.tensor.data)
    return ImportReport(num_bytes, tuple(fresh), tuple(unused))


def _compare(
    reader: HfReader, table: WeightTable, *, allow_fresh_head: bool
) -> tuple[list[str], list[str]]:
    """Return tensors that the files lack (a scalar head) and tensors without a place."""
    needed = dict(table.tensors)
    fresh = []
    if table.head == "sequence_classification" and "score.weight" not in reader.names:
        if not allow_fresh_head:
            raise ValueError(
                f"{reader.where}: a reward model must have score.weight; the files "
                "do not. Give the folder of a *ForSequenceClassification model."
            )
        fresh = ["score.weight"]
        del needed["score.weight"]
        log.info("%s has no score.weight: the scalar head keeps its initial values", reader.where)
    check_tensors(reader, needed)
    unused = sorted(reader.names - set(needed))
    inside = [n for n in unused if n.startswith("model.") and "rotary_emb.inv_freq" not in n]
    if inside:
        raise ValueError(
            f"{reader.where}: every tensor under model. must belong to "
            f"{table.config.architecture}; {len(inside)} do not, such as {inside[0]}. Use another "
            "model."
        )
    if surprising := sorted(set(unused) - _HEADS):
        log.warning("%s: no use for %s", reader.where, ", ".join(surprising))
    return fresh, unused


@torch.no_grad()
def _fill(target: Tensor, shard: Shard, reader: HfReader) -> int:
    """Copy the pieces into the parameter; returns the bytes read."""
    num_bytes = start = 0
    for piece in shard.pieces:
        part = target.narrow(piece.dim, start, piece.size)
        start += piece.size
        if piece.name is None:
            part.zero_()
            continue
        values = reader.read(piece)
        part.copy_(values)
        num_bytes += values.numel() * values.element_size()
    return num_bytes
