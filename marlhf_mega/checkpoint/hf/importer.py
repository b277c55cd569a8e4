"""Fill the parameters of one rank from a Hugging Face folder."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from marlhf_mega.checkpoint.hf.parameters import LocalParameter, find_shards
from marlhf_mega.checkpoint.hf.reader import HfReader, check_tensors, open_folder
from marlhf_mega.checkpoint.hf.table import Layout, Shard, WeightTable

log = logging.getLogger(__name__)

_HEADS = {"lm_head.weight", "score.weight"}


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
) -> list[str]:
    """Check a folder against the model, then read this rank's slices, one at a time.

    The whole folder is checked before any parameter is written. Communicates only through
    `broadcast`.

    Args:
        folder: a Hugging Face folder with safetensors.
        parameters: this rank's parameters; number formats may differ from those of the files.
        table: the weight table of the model.
        layout: this rank's position.
        key: the config key that names the folder, for error messages.
        allow_fresh_head: whether a scalar head that the folder lacks may keep its initial values.
        broadcast: sends `(name, tensor)` of the first data-parallel replica to the others, which
            then do not read; called for every parameter on every rank.
        progress: called with the number of bytes that were read, after every parameter.

    Returns:
        Tensors missing from the files, which keep their initial values: a new scalar head.

    Raises:
        ValueError: the folder's files are damaged or do not match the model.
        RuntimeError: a parameter does not have the shape that the table gives.
    """
    reader = open_folder(folder, key=key)
    fresh = _compare(reader, table, allow_fresh_head=allow_fresh_head)
    for parameter, shard in find_shards(parameters, table, layout):
        if fresh and any(piece.name in fresh for piece in shard.pieces):
            continue
        if broadcast is None or shard.is_first_replica:
            count = _fill(parameter.tensor, shard, reader)
            if progress is not None:
                progress(count)
        if broadcast is not None:
            broadcast(parameter.name, parameter.tensor.data)
    return fresh


def _compare(reader: HfReader, table: WeightTable, *, allow_fresh_head: bool) -> list[str]:
    """Return tensors that the files lack: a scalar head. Warn of those that the model lacks."""
    needed = dict(table.tensors)
    fresh = []
    if table.head == "sequence_classification" and "score.weight" not in reader.names:
        if not allow_fresh_head:
            raise ValueError(
                f"{reader.where}: a reward model must have score.weight; the files do not. "
                "Use the folder of a *ForSequenceClassification model."
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
        log.warning("%s: not used: %s", reader.where, ", ".join(surprising))
    return fresh


@torch.no_grad()
def _fill(target: Tensor, shard: Shard, reader: HfReader) -> int:
    """Copy the pieces into the parameter; return the bytes read."""
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
