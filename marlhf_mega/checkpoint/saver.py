"""Write checkpoints, at once or in the background while training goes on.

A save has three parts. All ranks agree on who writes what and, for a write in the background, copy
it to host memory. Then every rank writes, flushes and hashes its own files, without communication.
When all have done so, the first rank adds the tables and renames the folder. The first and the last
part run on the main thread of all ranks, so that no collective ever meets one of training.
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

from marlhf_mega.checkpoint import durable, folders, manifest, optimizer_state, sharded
from marlhf_mega.checkpoint.store import FORMAT
from marlhf_mega.checkpoint.together import Together, reason
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import (
    WorldPeers,
    agree_on_error,
    max_over_world,
    share_from_first,
    sum_over_world,
)
from marlhf_mega.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

_MARGIN_BYTES = 1 << 20
"""Tables, JSON and the file system's own blocks."""


@dataclass(frozen=True)
class _Written:
    """What one rank wrote."""

    results: dict[str, list[WriteResult]]
    """By role: where its pieces of tensors are."""
    facts: dict[str, manifest.Facts]


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A save that is not committed yet."""

    step: int
    state: str
    roles: Mapping[str, sharded.Staged]
    together: Together
    writing: Future[_Written] | None
    """None: the pieces are written when the save is finished."""
    started: float


class Saver:
    """Writes the checkpoints of one run. All ranks hold one and call the same methods."""

    def __init__(
        self, run_dir: Path, mesh: Mesh, *, keep: int, keep_every: int = 0, background: bool = False
    ) -> None:
        """Take what stays the same.

        Args:
            run_dir: the run directory, the same folder for all ranks.
            mesh: where this rank stands.
            keep: newest checkpoints that stay.
            keep_every: checkpoints of steps that are a multiple stay too; 0: none.
            background: write copies in a thread; `poll` or `finish` commits them.
        """
        self._run_dir, self._mesh = run_dir, mesh
        self._root = run_dir / "checkpoints"
        self._keep, self._keep_every = keep, keep_every
        self._thread = ThreadPoolExecutor(max_workers=1) if background else None
        self._begun: _Begun | None = None

    def save(self, step: int, roles: Mapping[str, sharded.Role], state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and make it the latest, or begin to if it is done in the background.

        A save that is in progress is finished first. What is given may be changed after the call.

        Args:
            step: steps that are done.
            roles: the trained models by name; of one given as chunks only the weights are written.
            state: JSON values: data position, controllers, counters; the first rank's are written.

        Returns:
            The folder.

        Raises:
            RuntimeError: there is no room, or writing failed on some rank; earlier checkpoints are
                untouched.
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
        copy = self._thread is not None
        staged = {
            name: together.on_all(
                partial(sharded.stage_role, temporary / name, role, self._mesh, copy=copy)
            )
            for name, role in roles.items()
        }
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
        """Commit the save in progress if every rank has written; nothing without one.

        Raises:
            RuntimeError: writing failed on some rank; earlier checkpoints are untouched.
        """
        if self._begun is None or self._begun.writing is None:
            return
        running, failed = _stage_of(self._begun.writing)
        flags = max_over_world(torch.tensor([running, failed], device=self._mesh.device))
        running, failed = flags.tolist()
        if failed or not running:
            self.finish()

    def finish(self) -> None:
        """Wait until the save in progress is written, and commit it; nothing without one.

        Raises:
            RuntimeError: writing failed on some rank; earlier checkpoints are untouched.
        """
        begun, self._begun = self._begun, None
        if begun is None:
            return
        together = begun.together
        work: Callable[[], _Written] = (
            begun.writing.result if begun.writing else partial(_write, begun.roles)
        )
        parts = WorldPeers(self._mesh).gather(together.on_all(work))
        together.on_first(lambda: self._commit(begun, parts))
        if self._mesh.rank == 0:
            folders.rotate(self._root, begun.step, keep=self._keep, keep_every=self._keep_every)
            seconds = time.perf_counter() - begun.started
            logger.info("checkpoint after step %d is written, in %.1f s", begun.step, seconds)

    def _commit(self, begun: _Begun, parts: list[_Written]) -> None:
        """Add the tables to what all ranks wrote, and rename the folder."""
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
    roles: Mapping[str, sharded.Role],
    state: Mapping[str, Any],
    mesh: Mesh,
    *,
    keep: int,
) -> Path:
    """Write a single checkpoint, see `Saver.save`. All ranks call it."""
    return Saver(run_dir, mesh, keep=keep).save(step, roles, state)


def check_writable(run_dir: Path, mesh: Mesh) -> None:
    """Refuse if some rank cannot write into the folder of checkpoints. All ranks call it.

    Raises:
        RuntimeError: with the rank and what the system says.
    """
    root = run_dir / "checkpoints"
    probe = root / f"probe_{mesh.rank}.tmp"
    problem = None
    try:
        root.mkdir(parents=True, exist_ok=True)
        durable.write(probe, "writable\n")
        probe.unlink()
    except OSError as error:
        problem = reason(error)
    failed = agree_on_error(problem, mesh)
    if failed is not None:
        raise RuntimeError(
            f"run.dir={run_dir}: must be a folder that every rank can write to; {failed}. "
            "Mend it or use another folder."
        )


def check_space(run_dir: Path, roles: Mapping[str, sharded.Role], mesh: Mesh) -> None:
    """Refuse if a checkpoint of these models does not fit on the disk. All ranks call it.

    Raises:
        RuntimeError: with both numbers.
    """
    mine = sum(sharded.bytes_to_write(role, mesh) for role in roles.values())
    needed = int(sum_over_world(torch.tensor(mine, device=mesh.device))) + _MARGIN_BYTES
    existing = next(p for p in (run_dir.absolute(), *run_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if share_from_first(free < needed, mesh):
        raise RuntimeError(
            f"run.dir={run_dir}: must have room for a checkpoint of {_megabytes(needed)}; "
            f"{_megabytes(share_from_first(free, mesh))} are free. Free space or use another disk; "
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


def _stage_of(writing: Future[_Written]) -> tuple[bool, bool]:
    """Return whether a write is still running, and whether it has failed."""
    done = writing.done()
    return not done, done and writing.exception() is not None


def _progress(role: sharded.Role, mesh: Mesh) -> dict[str, int]:
    if not isinstance(role, TrainState):
        return {}
    # A rank of a small model may hold no optimizer state, and so no counter.
    steps = torch.tensor(optimizer_state.num_steps(role), device=mesh.device)
    return {
        "optimizer_steps": int(max_over_world(steps)),
        "schedule_steps": role.schedule.num_steps,
    }


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
