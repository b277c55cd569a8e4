"""Write sharded parameters as a Hugging Face folder, every rank its own pieces."""

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from marlhf_mega.checkpoint.hf.parameters import LocalParameter, find_shards
from marlhf_mega.checkpoint.hf.shards import (
    Fragment,
    PieceWriter,
    ShardPlan,
    create_files,
    plan_shards,
    write_index,
)
from marlhf_mega.checkpoint.hf.side_files import SideFiles, write_side_files
from marlhf_mega.checkpoint.hf.table import Layout, Piece, WeightTable

MAX_SHARD_BYTES = 5 * 10**9
T = TypeVar("T")


class Peers(Protocol):
    """The other ranks of an export. Every rank calls each method, in the same order."""

    @property
    def rank(self) -> int:
        """This rank's number."""

    def agree(self, error: str | None) -> str | None:
        """Return the first error of any rank, none if all are well; also a barrier."""

    def gather(self, value: T) -> list[T]:
        """Return every rank's value to rank 0, an empty list to the others."""


@dataclass(frozen=True)
class Alone:
    """A single process."""

    rank: int = 0

    def agree(self, error: str | None) -> str | None:
        """Return the error."""
        return error

    def gather(self, value: T) -> list[T]:
        """Return the value."""
        return [value]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote."""

    num_tensors: int
    num_bytes: int
    """Bytes of all weight files, headers included."""
    files: tuple[str, ...]
    """Weight files."""


@dataclass
class _Job:
    """One export as one rank sees it."""

    target: Path
    plan: ShardPlan
    fragments: dict[str, list[Fragment]]
    peers: Peers
    written: list[Piece] = field(default_factory=list)

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
    peers: Peers = Alone(),
    gathered: bool = False,
    replace: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> ExportReport:
    """Write a folder that transformers loads. All ranks call it.

    Rank 0 creates files of the final size in `target`.tmp; every rank then writes its pieces where
    they belong, so no rank holds more than one piece besides its parameters. Rank 0 checks that
    every element was written exactly once, adds the index and the small files, and renames. After
    an error on any rank nothing is left behind and all ranks raise.

    Args:
        target: the folder; its parent must be seen by all ranks.
        parameters: this rank's.
        table: the correspondence of the model.
        layout: where this rank stands.
        dtype: of the files: float32, bfloat16 or float16.
        side_files: where config.json and the tokenizer come from.
        peers: the other ranks.
        gathered: rank 0 writes everything, one tensor at a time; for file systems on which several
            hosts must not write to one file (NFS, FUSE).
        replace: whether an earlier export at `target` may be replaced.
        max_shard_bytes: size after which a new file begins.
        progress: called with the number of bytes after every piece this rank wrote.

    Returns:
        What was written, the same on every rank.

    Raises:
        ValueError: the target is in the way, the disk is too small, config.json cannot be written.
        RuntimeError: another rank failed, writing failed, or elements are missing.
    """
    plan = plan_shards(table.tensors, dtype, max_shard_bytes)
    job = _Job(target, plan, _fragments(parameters, table, layout), peers)
    name = str(dtype).removeprefix("torch.")
    write = _write_gathered if gathered else _write_own
    try:
        _together(job, lambda: _begin(job, side_files, table, name, replace=replace), first=True)
        _together(job, lambda: write(job, progress))
        pieces = [piece for part in peers.gather(job.written) for piece in part]
        _together(job, lambda: _check_coverage(job, pieces), first=True)
        _together(job, lambda: _finish(job), first=True)
    except BaseException:
        if peers.rank == 0:
            shutil.rmtree(job.folder, ignore_errors=True)
        raise
    return ExportReport(len(plan.slots), plan.num_bytes, tuple(plan.headers))


def _together(job: _Job, step: Callable[[], None], *, first: bool = False) -> None:
    """Run a step, on rank 0 only where `first`, and raise on every rank if it failed on any."""
    own: ValueError | RuntimeError | None = None
    if job.peers.rank == 0 or not first:
        try:
            step()
        except OSError as error:
            own = RuntimeError(
                f"{job.target}: every file must be written; {error}. Nothing is left behind: mend "
                "the disk and export again."
            )
        except (ValueError, RuntimeError) as error:
            own = error
    agreed = job.peers.agree(None if own is None else str(own))
    if own is not None:
        raise own
    if agreed is not None:
        raise RuntimeError(agreed)


def _fragments(
    parameters: Iterable[LocalParameter], table: WeightTable, layout: Layout
) -> dict[str, list[Fragment]]:
    """Cut this rank's primary shards into views, by Hugging Face tensor."""
    fragments = defaultdict(list)
    for parameter, shard in find_shards(parameters, table, layout):
        start = 0
        for piece in shard.pieces if shard.is_primary else ():
            values = parameter.tensor.detach().narrow(piece.dim, start, piece.size)
            start += piece.size
            if piece.name is not None:
                fragments[piece.name].append(Fragment(piece, values))
    return fragments


def _begin(job: _Job, files: SideFiles, table: WeightTable, dtype: str, *, replace: bool) -> None:
    """Check the place, create the temporary folder, its small files and empty weight files."""
    target = job.target
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not is_free and not (replace and (target / "config.json").is_file()):
        raise ValueError(
            f"{target}: an export needs a new folder; this one is not empty. Name another or "
            "remove it."
        )
    shutil.rmtree(job.folder, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < job.plan.num_bytes:
        raise ValueError(
            f"{target}: the export needs {job.plan.num_bytes / 2**20:,.1f} MiB; the disk "
            f"has {free / 2**20:,.1f} MiB left. Free some or name another disk."
        )
    job.folder.mkdir()
    write_side_files(job.folder, files, config=table.config, head=table.head, dtype=dtype)
    create_files(job.plan, job.folder)


def _write_own(job: _Job, progress: Callable[[int], None] | None) -> None:
    with PieceWriter(job.plan, job.folder) as writer:
        for name in job.plan.slots:
            for fragment in job.fragments.get(name, ()):
                num_bytes = writer.write(fragment)
                job.written.append(fragment.piece)
                if progress is not None:
                    progress(num_bytes)


def _write_gathered(job: _Job, progress: Callable[[int], None] | None) -> None:
    """Send each tensor to rank 0, which keeps taking part after an error of its own."""
    failure: OSError | None = None
    with PieceWriter(job.plan, job.folder) as writer:
        for name in job.plan.slots:
            mine = [
                Fragment(f.piece, f.values.to("cpu", job.plan.dtype, copy=True))
                for f in job.fragments.get(name, ())
            ]
            for fragment in (f for part in job.peers.gather(mine) for f in part):
                if failure is not None:
                    continue
                try:
                    num_bytes = writer.write(fragment)
                except OSError as error:
                    failure = error
                    continue
                job.written.append(fragment.piece)
                if progress is not None:
                    progress(num_bytes)
    if failure is not None:
        raise failure


def _check_coverage(job: _Job, pieces: list[Piece]) -> None:
    """Demand that the pieces tile every tensor: no gap, no overlap."""
    ranges: dict[str | None, list[tuple[int, int]]] = defaultdict(list)
    dims: dict[str | None, int] = {}
    for piece in pieces:
        ranges[piece.name].append((piece.lo, piece.hi))
        assert dims.setdefault(piece.name, piece.dim) == piece.dim, piece
    for name, slot in job.plan.slots.items():
        end = 0
        for lo, hi in sorted(ranges[name]):
            if lo != end:
                break
            end = hi
        if not ranges[name] or end != slot.shape[dims[name]]:
            raise RuntimeError(
                f"{job.target}: every element of {name} must be written exactly once; it was not "
                f"from index {end} on. Export with the layout the model was built with."
            )


def _finish(job: _Job) -> None:
    """Write the index, make everything durable, and put the folder in its place."""
    write_index(job.plan, job.folder)
    for path in sorted(job.folder.rglob("*")):
        _sync(path)
    _sync(job.folder)
    old = job.target.with_name(job.target.name + ".old")
    if job.target.exists():
        shutil.rmtree(old, ignore_errors=True)
        job.target.rename(old)
    job.folder.rename(job.target)
    _sync(job.target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
