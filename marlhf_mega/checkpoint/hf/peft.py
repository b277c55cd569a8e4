"""Folders of peft: import and export of adapters, and of a scalar head that was saved with them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from marlhf_mega import durable
from marlhf_mega.checkpoint.hf.adapters import is_same_base
from marlhf_mega.checkpoint.hf.parameters import LocalParameter, find_shards
from marlhf_mega.checkpoint.hf.table import Layout, WeightTable
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.peft import CONFIG_FILE
from marlhf_mega.parallel.collectives import gather_objects_to_first

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DIGEST = "base_digest"


def check_adapters(
    folder: Path, tables: Iterable[WeightTable], *, key: str = "model.lora.path"
) -> str | None:
    """Check that a folder has the adapters of a model and no others, by the names and shapes alone.

    Args:
        folder: a folder of peft.
        tables: those of the model that have what is needed.
        key: the config key that names the folder, for messages.

    Returns:
        The hash of the frozen weights that an export of ours says it belongs to.

    Raises:
        ValueError: the files are damaged, or belong to a model of another shape.
    """
    where = f"{key}={folder}"
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
            digest: str | None = (opened.metadata() or {}).get(_DIGEST)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{where}: must have a complete {WEIGHTS_FILE}; {error}. Save the adapter again."
        ) from None
    _check(where, shapes, {n: s for table in tables for n, s in _needed(table).items()})
    return digest


@torch.no_grad()
def import_adapters(
    folder: Path,
    parts: Iterable[tuple[list[LocalParameter], WeightTable]],
    layout: Layout,
    *,
    digest: str | None,
    key: str = "model.lora.path",
) -> None:
    """Fill this rank's adapters; everything is checked first. Does not communicate.

    Args:
        folder: a folder of peft.
        parts: parameters, and the table that has their tensors.
        layout: this rank's position.
        digest: hash of the frozen weights; an export of ours says which it belongs to.
        key: the config key that names the folder, for messages.

    Raises:
        ValueError: the files are damaged, or belong to a model of another shape; a `ConfigError` if
            they belong to other weights.
    """
    parts = list(parts)
    expected = check_adapters(folder, [table for _, table in parts], key=key)
    if digest is not None and expected is not None and not is_same_base(expected, digest):
        raise ConfigError(
            f"{key}={folder}: must belong to the weights of this model, hash {digest}; its own are "
            f"those with hash {expected}. Use the model that it was trained on, or its "
            "precision.dtype."
        )
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for parameters, table in parts:
        for local, shard in find_shards(parameters, table, layout):
            local.tensor.zero_()
            done = 0
            for piece in shard.pieces:
                if piece.name is not None:
                    value = tensors[_PREFIX + piece.name].narrow(piece.dim, piece.lo, piece.size)
                    local.tensor.narrow(piece.dim, done, piece.size).copy_(value)
                done += piece.size


def export_adapters(
    target: Path,
    parts: Iterable[tuple[list[LocalParameter], WeightTable]],
    layout: Layout,
    *,
    config: Mapping[str, object],
    digest: str | None,
) -> None:
    """Write a folder of peft; the first rank writes. All ranks call it.

    Args:
        target: the folder; files of an earlier export are replaced.
        parts: parameters, and the table that has their tensors.
        layout: this rank's position.
        config: content of `adapter_config.json`.
        digest: hash of the frozen weights.
    """
    mine: list[tuple[str, int, int, Tensor]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for parameters, table in parts:
        shapes |= _needed(table)
        for local, shard in find_shards(parameters, table, layout):
            done = 0
            for piece in shard.pieces:
                if piece.name is not None and shard.is_primary:
                    part = local.tensor.detach().narrow(piece.dim, done, piece.size).cpu().clone()
                    mine.append((piece.name, piece.dim, piece.lo, part))
                done += piece.size
    held = gather_objects_to_first(mine)
    if not held:
        return
    pieces = [piece for rank in held for piece in rank]
    dtype = pieces[0][3].dtype
    whole = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    for name, dim, lo, part in pieces:
        whole[_PREFIX + name].narrow(dim, lo, part.shape[dim]).copy_(part)
    metadata = {"format": "pt"} | ({} if digest is None else {_DIGEST: digest})
    target.mkdir(parents=True, exist_ok=True)
    with durable.replacing(target / WEIGHTS_FILE) as file:
        save_file(whole, file, metadata=metadata)
    durable.replace(target / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def _needed(table: WeightTable) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors in a file: of adapters all, else the scalar head's."""
    named = table.tensors.items()
    return {_PREFIX + n: s for n, s in named if ".lora_" in n or n == "score.weight"}


def _check(
    where: str, found: Mapping[str, Sequence[int]], needed: Mapping[str, tuple[int, ...]]
) -> None:
    if absent := sorted(needed.keys() - found.keys()):
        raise ValueError(
            f"{where}: must have an adapter for every target of the model; {len(absent)} of "
            f"{len(needed)} tensors are missing, first {absent[0]}. Use the adapters of this model."
        )
    if unused := sorted(found.keys() - needed.keys()):
        raise ValueError(
            f"{where}: must have nothing besides; the model has no place for {unused[0]}. Use the "
            "adapters of this model and of its head."
        )
    for name, shape in needed.items():
        if tuple(found[name]) != shape:
            raise ValueError(
                f"{where}: {name} must have shape {list(shape)} as the model's; it has "
                f"{list(found[name])}. Use the adapters of this model."
            )
