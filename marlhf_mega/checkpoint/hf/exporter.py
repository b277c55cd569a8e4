"""Write sharded parameters to a Hugging Face folder, every rank blocks of whole rows."""

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from marlhf_mega import durable
from marlhf_mega.checkpoint.hf.auto_tokenizer import fit_auto_tokenizer
from marlhf_mega.checkpoint.hf.parameters import LocalParameter, find_shards
from marlhf_mega.checkpoint.hf.shards import (
    BlockWriter,
    ShardPlan,
    create_files,
    plan_shards,
    write_index,
)
from marlhf_mega.checkpoint.hf.side_files import SideFiles, write_side_files
from marlhf_mega.checkpoint.hf.table import Layout, Piece, WeightTable
from marlhf_mega.parallel.collectives import agree_on_error, gather_objects, send_bytes
from marlhf_mega.parallel.mesh import Group, Mesh

MAX_SHARD_BYTES = 5 * 10**9
BLOCK_BYTES = 32 * 2**20
"""Bytes that are sent, converted and written at a time."""
T = TypeVar("T")


class Peers:
    """Ranks that export together. All of them call the same methods in the same order."""

    def __init__(self, mesh: Mesh, group: Group | None = None) -> None:
        """Take this rank's mesh and the ranks' process group; none: all ranks of the world."""
        self._group, self._device = group, mesh.device
        self.rank = mesh.rank if group is None else group.rank()
        self.size = mesh.world_size if group is None else group.size()

    def agree(self, error: str | None) -> str | None:
        """Return the error of the first rank that has one, None if no rank has one."""
        return agree_on_error(error, self._group)

    def list_all(self, value: T) -> list[T]:
        """Return the values of all ranks."""
        return gather_objects(value, self._group)

    def send(self, values: Tensor, sizes: Sequence[int], *, to: int) -> list[Tensor]:
        """Send every rank's bytes to one rank and return them there, an empty list elsewhere."""
        return send_bytes(values.to(self._device), sizes, self._group, to=to)


@dataclass(frozen=True)
class ExportReport:
    """The result of an export."""

    num_tensors: int
    num_bytes: int
    """Bytes of all weight files, headers included."""
    files: tuple[str, ...]
    """Weight files."""


@dataclass(frozen=True)
class _Fragment:
    """One piece and its values, a view of a parameter on any device."""

    piece: Piece
    values: Tensor


@dataclass(frozen=True)
class _Export:
    """One rank's part of an export."""

    target: Path
    plan: ShardPlan
    fragments: dict[str, list[_Fragment]]
    peers: Peers

    @property
    def pieces(self) -> dict[str, list[Piece]]:
        """What this rank holds of every tensor."""
        return {name: [f.piece for f in held] for name, held in self.fragments.items()}

    @property
    def folder(self) -> Path:
        return self.target.with_name(self.target.name + ".tmp")


def export_weights(
    target: Path,
    parameters: Iterable[LocalParameter],
    table: WeightTable,
    layout: Layout,
    *,
    dtype: torch.dtype,
    side_files: SideFiles,
    peers: Peers,
    tensor_peers: Peers,
    gathered: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> ExportReport:
    """Write a folder that transformers can load. All ranks call it.

    Rank 0 creates files of the final size in `target`.tmp and checks that the ranks' pieces tile
    every tensor. The ranks then write blocks of whole rows at their offsets; a rank holds a few
    blocks besides its parameters. Rank 0 adds the index and the small files, and renames the
    folder. After an error on any rank, nothing is left behind and all ranks raise.

    Args:
        target: the folder, new, empty or an earlier export; all ranks must see its parent.
        parameters: this rank's parameters.
        table: the weight table of the model.
        layout: this rank's position.
        dtype: of the files: float32, bfloat16 or float16.
        side_files: where config.json and the tokenizer come from.
        peers: all ranks.
        tensor_peers: the tensor-parallel ranks, which put the columns of rows together.
        gathered: rank 0 writes everything; for file systems on which several hosts must not write
            to one file (NFS, FUSE).
        max_shard_bytes: largest size of a file.
        progress: called with the number of bytes after every block that this rank wrote.

    Returns:
        The same on every rank.

    Raises:
        ValueError: the target is not free, the disk is too small, config.json cannot be written.
        RuntimeError: another rank failed, writing failed, or elements are missing.
    """
    plan = plan_shards(table.tensors, dtype, max_shard_bytes)
    export = _Export(target, plan, _fragments(parameters, table, layout), peers)
    name = str(dtype).removeprefix("torch.")
    try:
        _together(export, lambda: _begin(export, side_files, table, name), first=True)
        held = peers.list_all(export.pieces)
        _together(export, lambda: _check_coverage(export, held), first=True)
        if gathered:
            _together(export, lambda: _write(export, peers, held, writer=0, progress=progress))
        else:
            held = tensor_peers.list_all(export.pieces)
            _together(export, lambda: _write(export, tensor_peers, held, progress=progress))
        _together(export, lambda: _finish(export), first=True)
    except BaseException:
        if peers.rank == 0:
            shutil.rmtree(export.folder, ignore_errors=True)
        raise
    return ExportReport(len(plan.slots), plan.num_bytes, tuple(plan.headers))


def _together(export: _Export, step: Callable[[], None], *, first: bool = False) -> None:
    """Run a step, on rank 0 only if `first`, and raise on every rank if it failed on any."""
    own: ValueError | RuntimeError | None = None
    if export.peers.rank == 0 or not first:
        try:
            step()
        except OSError as error:
            own = RuntimeError(
                f"{export.target}: every file must be written; {error}. Nothing is left behind: "
                "fix the disk and export again."
            )
        except (ValueError, RuntimeError) as error:
            own = error
    agreed = export.peers.agree(None if own is None else f"rank {export.peers.rank}: {own}")
    if own is not None:
        raise own
    if agreed is not None:
        raise RuntimeError(agreed)


def _fragments(
    parameters: Iterable[LocalParameter], table: WeightTable, layout: Layout
) -> dict[str, list[_Fragment]]:
    """Split this rank's primary shards into views, by Hugging Face tensor."""
    fragments = defaultdict(list)
    for parameter, shard in find_shards(parameters, table, layout):
        start = 0
        for piece in shard.pieces if shard.is_primary else ():
            values = parameter.tensor.detach().narrow(piece.dim, start, piece.size)
            start += piece.size
            if piece.name is not None:
                fragments[piece.name].append(_Fragment(piece, values))
    return fragments


def _begin(export: _Export, files: SideFiles, table: WeightTable, dtype: str) -> None:
    """Check the target and create the temporary folder with small files and empty weight files."""
    target = export.target
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not is_free and not (target / "config.json").is_file():
        raise ValueError(
            f"{target}: must be a new or empty folder; it is neither. Use another one or remove it."
        )
    shutil.rmtree(export.folder, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < export.plan.num_bytes:
        raise ValueError(
            f"{target}: the export needs {export.plan.num_bytes / 2**20:,.1f} MiB; the disk "
            f"has {free / 2**20:,.1f} MiB left. Free space or use another disk."
        )
    export.folder.mkdir()
    write_side_files(export.folder, files, config=table.config, head=table.head, dtype=dtype)
    fit_auto_tokenizer(export.folder)
    create_files(export.plan, export.folder)


def _check_coverage(export: _Export, held: Sequence[Mapping[str, Sequence[Piece]]]) -> None:
    """Raise unless the pieces of all ranks tile every tensor, without gaps and overlaps."""
    for name, slot in export.plan.slots.items():
        pieces = [piece for of_rank in held for piece in of_rank.get(name, ())]
        assert len({piece.dim for piece in pieces}) <= 1, name
        end = 0
        for lo, hi in sorted((piece.lo, piece.hi) for piece in pieces):
            if lo != end:
                break
            end = hi
        if not pieces or end != slot.shape[pieces[0].dim]:
            raise RuntimeError(
                f"{export.target}: every element of {name} must be held by exactly one rank; from "
                f"index {end} on it is not. Export with the layout that the model was built with."
            )


@dataclass(frozen=True)
class _Block:
    """Whole rows of a tensor, which one rank writes."""

    name: str
    rows: range
    parts: Sequence[tuple[int, Piece]]
    """Who holds which piece: one rank's rows, or several ranks' columns in order."""

    def shape_of(self, piece: Piece, full: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of one rank's part, given that of the whole tensor."""
        return (len(self.rows), *(full[1:] if piece.dim == 0 else (piece.size, *full[2:])))

    def share(self, export: _Export, piece: Piece) -> Tensor:
        """Return what this rank holds of it, [rows, columns of the piece]."""
        (values,) = (f.values for f in export.fragments[self.name] if f.piece == piece)
        first = self.rows.start - (piece.lo if piece.dim == 0 else 0)
        return values[first : first + len(self.rows)].to(export.plan.dtype)


def _blocks(
    export: _Export, name: str, held: Sequence[Mapping[str, Sequence[Piece]]]
) -> Iterator[_Block]:
    """Cut what a group of ranks holds of a tensor into blocks, the same on all of them."""
    parts = [(rank, p) for rank, pieces in enumerate(held) for p in pieces.get(name, ())]
    parts.sort(key=lambda part: part[1].lo)
    is_cut_in_columns = bool(parts) and parts[0][1].dim == 1
    shape = export.plan.slots[name].shape
    step = max(1, BLOCK_BYTES // (prod(shape[1:]) * export.plan.dtype.itemsize))
    if is_cut_in_columns:  # so that each of these ranks writes
        step = min(step, -(-shape[0] // len(parts)))
    for together in [parts] if is_cut_in_columns else [[part] for part in parts]:
        piece = together[0][1]
        top, end = (0, shape[0]) if is_cut_in_columns else (piece.lo, piece.hi)
        for first in range(top, end, step):
            yield _Block(name, range(first, min(first + step, end)), together)


def _write(
    export: _Export,
    peers: Peers,
    held: Sequence[Mapping[str, Sequence[Piece]]],
    *,
    writer: int | None = None,
    progress: Callable[[int], None] | None,
) -> None:
    """Write what a group of ranks holds; after an error of its own a rank still sends its part.

    Args:
        export: this rank's part.
        peers: the group.
        held: the pieces of every rank of the group.
        writer: the rank that writes everything; none: those that hold the rows take turns.
        progress: see `export_weights`.
    """
    failure: OSError | None = None
    with BlockWriter(export.plan, export.folder) as files:
        for name in export.plan.slots:
            is_shared = False
            for number, block in enumerate(_blocks(export, name, held)):
                to = block.parts[number % len(block.parts)][0] if writer is None else writer
                is_shared |= any(rank != to for rank, _ in block.parts)
                values = _assemble(export, peers, block, to=to)
                if values is None or failure is not None:
                    continue
                try:
                    num_bytes = files.write(name, block.rows.start, values)
                except OSError as error:
                    failure = error
                    continue
                if progress is not None:
                    progress(num_bytes)
            # A rank that has nothing to send must not run ahead of the others for long.
            if is_shared and peers.agree(None if failure is None else str(failure)) is not None:
                break
    if failure is not None:
        raise failure


def _assemble(export: _Export, peers: Peers, block: _Block, *, to: int) -> Tensor | None:
    """Return a block in host memory on the rank that writes it, None elsewhere."""
    holders, dtype = dict(block.parts), export.plan.dtype
    own = holders.get(peers.rank)
    share = torch.empty(0, dtype=dtype) if own is None else block.share(export, own)
    if holders.keys() == {to}:
        return None if own is None else share.cpu()
    full = export.plan.slots[block.name].shape
    shapes = {rank: block.shape_of(piece, full) for rank, piece in block.parts}
    sizes = [prod(shapes.get(rank, (0,))) * dtype.itemsize for rank in range(peers.size)]
    received = peers.send(share.contiguous().flatten().view(torch.uint8), sizes, to=to)
    if not received:
        return None
    columns = [received[rank].view(dtype).view(shape) for rank, shape in shapes.items()]
    return (columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)).cpu()


def _finish(export: _Export) -> None:
    """Write the index, flush everything to the disk, and rename the folder."""
    write_index(export.plan, export.folder)
    for path in sorted(export.folder.rglob("*")):
        durable.sync(path)
    durable.sync(export.folder)
    old = export.target.with_name(export.target.name + ".old")
    if export.target.exists():
        shutil.rmtree(old, ignore_errors=True)
        durable.rename(export.target, old)
    durable.rename(export.folder, export.target)
    shutil.rmtree(old, ignore_errors=True)
