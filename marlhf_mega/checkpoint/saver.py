"""Write checkpoints, either immediately or in the background while training continues.

A save has three parts. First, all ranks agree on who writes what and, to write in the background,
copy it to host memory. Second, every rank writes, flushes and hashes its own files, without
communication. Third, when all ranks have finished, rank 0 adds the tables and renames the folder.
The first and third part run on the main thread of all ranks, so that their collectives never mix
with those of training.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.storage import WriteResult

from marlhf_mega import durable
from marlhf_mega.checkpoint import folders, manifest, optimizer_state, sharded
from marlhf_mega.checkpoint.agreement import Together, reason
from marlhf_mega.checkpoint.contents import FORMAT
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import (
    agree_on_error,
    broadcast_object,
    gather_objects_to_first,
    max_over_world,
    sum_over_world,
)
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.platform.host_memory import HostCopies

logger = logging.getLogger(__name__)

_MARGIN_BYTES = 1 << 20
"""Room for tables, JSON and the file system's own blocks."""


@dataclass(frozen=True)
class _Written:
    """What one rank wrote."""

    results: dict[str, list[WriteResult]]
    """Where the pieces of tensors are, by role."""
    facts: dict[str, manifest.Facts]
    """Size and sha256, by file."""


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A save that is not committed yet."""

    step: int
    state: str
    roles: Mapping[str, sharded.Staged]
    together: Together
    writing: Future[_Written] | None
    """None means that the pieces are written in `finish`."""
    started: float


class Saver:
    """Writes the checkpoints of one run. All ranks call the same methods.

    Attributes:
        best: step of a complete checkpoint that is kept however old it is; None without one.
    """

    def __init__(
        self, run_dir: Path, mesh: Mesh, *, keep: int, keep_every: int = 0, background: bool = False
    ) -> None:
        """Set what all saves have in common.

        Args:
            run_dir: the run directory, the same folder for all ranks.
            mesh: this rank's mesh.
            keep: number of newest checkpoints to keep.
            keep_every: also keep steps that are a multiple of this; 0 means none.
            background: write copies in a thread; `poll` or `finish` commits them.
        """
        self._run_dir, self._mesh = run_dir, mesh
        self._root = run_dir / "checkpoints"
        self._keep, self._keep_every = keep, keep_every
        self._thread = ThreadPoolExecutor(max_workers=1) if background else None
        self._copies: dict[str, HostCopies] = {}
        """By role, of saves in the background."""
        self._begun: _Begun | None = None
        self.best: int | None = None

    def save(
        self, step: int, roles: Mapping[str, sharded.Saveable], state: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint and make it the latest, or start to do so in the background.

        Finishes a save that is in progress first. The arguments may be changed after the call.

        Args:
            step: number of finished steps.
            roles: the trained models by name; for those given as chunks only weights are written.
            state: JSON values: data position, controllers, counters; rank 0's are written.

        Returns:
            The folder of the checkpoint.

        Raises:
            RuntimeError: the disk is too small, or writing failed on some rank; earlier checkpoints
                are unchanged.
        """
        self.finish()
        started = time.perf_counter()
        target = folders.path_of(self._root, step)
        temporary = folders.temporary_of(target)
        progress = {name: _progress(role, self._mesh) for name, role in roles.items()}
        whole = {"format": FORMAT, "step": step, "roles": progress, "state": state}
        give_up = partial(shutil.rmtree, temporary, ignore_errors=True)
        together = Together(target, self._mesh, give_up=give_up)
        together.on_first(lambda: folders.remove_leftovers(self._root))
        check_space(self._run_dir, roles, self._mesh)
        together.on_first(lambda: folders.begin(target, [*roles]))
        if self._thread is not None:
            self._copies = self._copies or {name: HostCopies(self._mesh.platform) for name in roles}
        staged = {}
        for name, role in roles.items():
            copy = self._copies.get(name)
            stage = partial(sharded.stage_role, temporary / name, role, self._mesh, copy=copy)
            staged[name] = together.on_all(stage)
        self._begun = _Begun(
            step=step,
            state=json.dumps(whole, indent=1),
            roles=staged,
            together=together,
            writing=self._thread.submit(_write, staged) if self._thread else None,
            started=started,
        )
        if self._thread is None:
            self.finish()
        return target

    def poll(self) -> None:
        """Commit the save in progress, if there is one and every rank has written its files.

        Raises:
            RuntimeError: writing failed on some rank; earlier checkpoints are unchanged.
        """
        if self._begun is None or self._begun.writing is None:
            return
        writing = self._begun.writing
        own = [not writing.done(), writing.done() and writing.exception() is not None]
        flags = max_over_world(torch.tensor(own, device=self._mesh.device))
        running, failed = flags.tolist()
        if failed or not running:
            self.finish()

    def finish(self) -> None:
        """Wait for the save in progress, if there is one, and commit it.

        Raises:
            RuntimeError: writing failed on some rank; earlier checkpoints are unchanged.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return
        together = begun.together
        work: Callable[[], _Written] = (
            begun.writing.result if begun.writing else partial(_write, begun.roles)
        )
        parts = gather_objects_to_first(together.on_all(work))
        together.on_first(lambda: self._commit(begun, parts))
        if self._mesh.rank == 0:
            folders.rotate(
                self._root,
                begun.step,
                keep=self._keep,
                keep_every=self._keep_every,
                best=self.best,
            )
            seconds = time.perf_counter() - begun.started
            logger.info("wrote the checkpoint after step %d in %.1f s", begun.step, seconds)

    def _commit(self, begun: _Begun, parts: list[_Written]) -> None:
        """Add the tables to the files of all ranks, and rename the folder."""
        target = folders.path_of(self._root, begun.step)
        temporary = folders.temporary_of(target)
        files = {name: facts for part in parts for name, facts in part.facts.items()}
        tables = [temporary / manifest.STATE]
        durable.write(temporary / manifest.STATE, begun.state)
        for name, role in begun.roles.items():
            tables += role.write_tables([part.results[name] for part in parts])
        files |= {str(table.relative_to(temporary)): manifest.facts(table) for table in tables}
        layout = self._mesh.describe()
        text = manifest.make(files, format=FORMAT, step=begun.step, layout=layout)
        folders.commit(target, text)


def save(
    run_dir: Path,
    step: int,
    roles: Mapping[str, sharded.Saveable],
    state: Mapping[str, Any],
    mesh: Mesh,
    *,
    keep: int,
) -> Path:
    """Write one checkpoint, see `Saver.save`. All ranks call it."""
    return Saver(run_dir, mesh, keep=keep).save(step, roles, state)


def check_writable(run_dir: Path, mesh: Mesh) -> None:
    """Raise if some rank cannot write to the folder of checkpoints. All ranks call it.

    Raises:
        RuntimeError: with the rank and the system's error.
    """
    root = run_dir / "checkpoints"
    probe = root / f"probe_{mesh.rank}.tmp"
    problem = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        durable.write(probe, "writable\n")
        probe.unlink()
    except OSError as error:
        problem = f"rank {mesh.rank}: {reason(error)}"
    failed = agree_on_error(problem)
    if failed is not None:
        raise RuntimeError(
            f"run.dir={run_dir}: must be a folder that every rank can write to; {failed}. "
            "Fix it or use another folder."
        )


def clear_leftovers(run_dir: Path, mesh: Mesh) -> None:
    """Remove what interrupted saves left, so that it does not count as used. All ranks call it.

    Raises:
        RuntimeError: with what the system says.
    """
    target = run_dir / "checkpoints"
    together = Together(target, mesh, give_up=lambda: None)
    together.on_first(lambda: folders.remove_leftovers(target))


def check_space(run_dir: Path, roles: Mapping[str, sharded.Saveable], mesh: Mesh) -> None:
    """Raise if a checkpoint of these models does not fit on the disk. All ranks call it.

    Raises:
        RuntimeError: with the needed and the free bytes.
    """
    mine = sum(sharded.bytes_to_write(role, mesh) for role in roles.values())
    needed = int(sum_over_world(torch.tensor(mine, device=mesh.device))) + _MARGIN_BYTES
    root = (run_dir / "checkpoints").resolve()  # may be a link to another disk
    existing = next(p for p in (root, *root.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if broadcast_object(free < needed):
        raise RuntimeError(
            f"run.dir={run_dir}: must have room for a checkpoint of {_megabytes(needed)}; "
            f"{_megabytes(broadcast_object(free))} are free. Free space or use another disk; "
            "earlier checkpoints are intact."
        )


def _write(roles: Mapping[str, sharded.Staged]) -> _Written:
    """Write, flush and hash this rank's files."""
    written = _Written({}, {})
    for name, role in roles.items():
        written.results[name] = role.write()
        for file in {result.storage_data.relative_path for result in written.results[name]}:
            written.facts[f"{name}/{file}"] = manifest.facts(role.folder / file)
    return written


def _progress(role: sharded.Saveable, mesh: Mesh) -> dict[str, Any]:
    if not isinstance(role, TrainState):
        return {}
    # With a small model a rank may hold no optimizer state, and so no counter.
    steps = torch.tensor(optimizer_state.steps_taken(role), device=mesh.device)
    base = {} if role.base_digest is None else {"base_digest": role.base_digest}
    return base | {
        "optimizer_steps": int(max_over_world(steps)),
        "schedule_steps": role.schedule.num_steps,
    }


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
