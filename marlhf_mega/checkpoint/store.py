"""Checkpoints of a run: sharded by Megatron, verified by checksums, committed by one rename.

`step_000012/` holds one folder per trained model, `state.json` with everything else a run consists
of, and `manifest.json` with the size and sha256 of every file. It is written as `step_000012.tmp`
and renamed when complete; then `latest`, which holds the folder's name, is replaced. Whenever the
run is killed, the folder that `latest` names, or the one that it named before, is complete.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from marlhf_mega.checkpoint import durable, folders, manifest, optimizer_state, sharded
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import (
    WorldPeers,
    agree_on_error,
    max_over_world,
    share_from_first,
    sum_over_world,
)
from marlhf_mega.parallel.mesh import Mesh

T = TypeVar("T")

logger = logging.getLogger(__name__)

STATE = "state.json"
SCALAR_ROLES = ("reward", "critic")
"""Roles whose models end in one number."""
_FORMAT = 1
_MARGIN_BYTES = 1 << 20
"""Tables, JSON and the file system's own blocks."""


def save(
    run_dir: Path,
    step: int,
    roles: Mapping[str, sharded.Role],
    state: Mapping[str, Any],
    mesh: Mesh,
    *,
    keep: int,
    keep_every: int = 0,
    config_hash: str = "",
) -> Path:
    """Write one checkpoint and make it the latest. All ranks call it.

    Args:
        run_dir: the run directory, the same folder for all ranks.
        step: steps that are done.
        roles: the trained models by name; of one given as chunks only the weights are written.
        state: JSON values: data position, controllers, counters; the first rank's are written.
        mesh: where this rank stands.
        keep: newest checkpoints that stay.
        keep_every: checkpoints of steps that are a multiple stay too; 0: none.
        config_hash: of the configuration, noted in the manifest.

    Returns:
        The folder.

    Raises:
        RuntimeError: there is no room, or writing failed on some rank; earlier checkpoints are
            untouched.
    """
    root = run_dir / "checkpoints"
    target = folders.path_of(root, step)
    temporary = folders.temporary_of(target)
    text = json.dumps(
        {
            "format": _FORMAT,
            "step": step,
            "roles": {name: _progress(role, mesh) for name, role in roles.items()},
            "state": state,
        },
        indent=1,
    )
    together = _Undertaking(target, mesh)
    together.on_first(lambda: folders.remove_leftovers(root))
    check_space(run_dir, roles, mesh)
    together.on_first(lambda: folders.begin(target, [*roles]))
    for name, role in roles.items():
        together.on_all(partial(sharded.save_role, temporary / name, role, mesh))
    together.on_first(lambda: durable.write(temporary / STATE, text))
    files = together.on_all(lambda: _hash_share(temporary, mesh))
    facts = {name: fact for part in WorldPeers(mesh).gather(files) for name, fact in part.items()}
    about = {"format": _FORMAT, "step": step, "layout": mesh.describe(), "config": config_hash}
    together.on_first(lambda: folders.commit(target, manifest.make(facts, **about)))
    if mesh.rank == 0:
        folders.rotate(root, step, keep=keep, keep_every=keep_every)
    return target


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
        problem = _reason(error)
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


def find(run_dir: Path, mesh: Mesh) -> Path | None:
    """Return the newest checkpoint whose files are all as they were written. All ranks call it.

    That is the one that `latest` names, else an older one, else a newer one. What is damaged is
    named in one warning.

    Raises:
        RuntimeError: there are checkpoints, but all of them are damaged.
    """
    root = run_dir / "checkpoints"
    names, remarks = share_from_first(folders.candidates(root), mesh)
    for name in names:
        problem = _agree(manifest.find_damage(root / name, _share(mesh)), mesh)
        if problem is None:
            if remarks and mesh.rank == 0:
                logger.warning("%s: %s; using %s", root, "; ".join(remarks), name)
            return root / name
        remarks.append(f"{name} is damaged, {problem}")
    if not names:
        return None
    raise RuntimeError(
        f"{root}: must hold a checkpoint that is as it was written; {'; '.join(remarks)}. Restore "
        "a file from a copy, or use another run.dir to start afresh."
    )


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state that was given to `save`. Does not communicate.

    Args:
        folder: from `find`, which has verified it.
    """
    state: dict[str, Any] = _read_state(folder)["state"]
    return state


def load(
    folder: Path, roles: Mapping[str, TrainState], mesh: Mesh, *, required: Sequence[str] = ()
) -> dict[str, Any]:
    """Restore the trained models, at this or another layout. All ranks call it.

    At the layout of the save, training goes on bit for bit. Hyper-parameters are those of the
    present configuration; the learning rate is that of its schedule at the saved step.

    Args:
        folder: from `find`, which has verified it.
        roles: the models to restore, built as for a fresh start.
        mesh: where this rank stands.
        required: keys that the state must have.

    Returns:
        The state that was given to `save`.

    Raises:
        RuntimeError: a model, a tensor or a key is missing, or was never part of this model.
    """
    whole = _read_state(folder)
    for kind, names, held in (
        ("model", roles, whole["roles"]),
        ("state", required, whole["state"]),
    ):
        for name in names:
            if name not in held:
                raise RuntimeError(
                    f"{folder}: must hold the {kind} {name}; it has {', '.join(held) or 'none'}. "
                    "Use a checkpoint of the same kind of run."
                )
    for name, role in roles.items():
        _check_role(folder / name, role, mesh)
    for name, role in roles.items():
        _readable(folder / name, partial(sharded.load_role, folder / name, role, mesh))
        progress = whole["roles"][name]
        optimizer_state.set_num_steps(role, progress["optimizer_steps"])
        role.schedule.num_steps = 0
        role.schedule.step(increment=progress["schedule_steps"])
    state: dict[str, Any] = whole["state"]
    return state


def load_weights(
    source: Path, chunks: Sequence[StageModel], mesh: Mesh, *, role: str | None = None
) -> list[str]:
    """Fill a model with trained weights, at any layout. All ranks call it.

    Args:
        source: the directory of an sft, reward or ppo run, or one checkpoint.
        chunks: this rank's chunks, not wrapped for training; a scalar head keeps its values if
            the checkpoint has none.
        mesh: where this rank stands.
        role: whose weights; none: the first there is of those that suit the head.

    Returns:
        Names of the tensors that the checkpoint does not have, the same on every rank.

    Raises:
        RuntimeError: there is no checkpoint, or it is damaged or lacks anything else.
    """
    folder = _resolve(source, mesh)
    suitable = ("policy",) if chunks[0].head == "language" else (*SCALAR_ROLES, "policy")
    wanted = suitable if role is None else (role,)
    held = _read_state(folder)["roles"]
    name = next((name for name in wanted if name in held), None)
    if name is None:
        raise RuntimeError(
            f"{folder}: must hold the model {' or '.join(wanted)}; it has {', '.join(held)}. "
            "Name another run."
        )
    parts = _gather(
        _readable(folder / name, lambda: sharded.compare_weights(folder / name, chunks, mesh)), mesh
    )
    absent = {tensor: problem for part in parts for tensor, problem in part.items()}
    fresh = {sharded.HEAD} if chunks[0].head == "scalar" else set()
    for tensor, problem in absent.items():
        if tensor not in fresh:
            raise RuntimeError(
                f"{folder / name}: must hold the weights of this model; it {problem}. Use the "
                "model settings of that run."
            )
    _readable(
        folder / name,
        lambda: sharded.load_weights(folder / name, chunks, mesh, absent=set(absent)),
    )
    return sorted(absent)


class _Undertaking:
    """Steps of a save that all ranks take or give up together."""

    def __init__(self, target: Path, mesh: Mesh) -> None:
        self._target, self._mesh = target, mesh

    def on_first(self, work: Callable[[], None]) -> None:
        """Do something on the first rank while the others wait."""
        self.on_all(work if self._mesh.rank == 0 else lambda: None)

    def on_all(self, work: Callable[[], T]) -> T:
        """Do something on every rank."""
        error, result = None, None
        try:
            result = work()
        except OSError as problem:
            error = f"rank {self._mesh.rank}: {_reason(problem)}"
        except CheckpointException as problem:
            error = _reason(problem)
        failed = _agree(error, self._mesh)
        if failed is None:
            return cast(T, result)
        if self._mesh.rank == 0:
            shutil.rmtree(folders.temporary_of(self._target), ignore_errors=True)
        raise RuntimeError(
            f"{self._target}: could not be written; {failed}. Mend the disk or free space; earlier "
            "checkpoints are intact."
        )


def _progress(role: sharded.Role, mesh: Mesh) -> dict[str, int]:
    if not isinstance(role, TrainState):
        return {}
    # A rank of a small model may hold no optimizer state, and so no counter.
    steps = torch.tensor(optimizer_state.num_steps(role), device=mesh.device)
    return {
        "optimizer_steps": int(max_over_world(steps)),
        "schedule_steps": role.schedule.num_steps,
    }


def _hash_share(folder: Path, mesh: Mesh) -> dict[str, manifest.Facts]:
    names = manifest.list_files(folder)
    return {name: manifest.facts(folder / name) for name in names[_share(mesh)]}


def _resolve(source: Path, mesh: Mesh) -> Path:
    """Return the verified checkpoint that a run directory or a checkpoint folder stands for."""
    if share_from_first((source / manifest.FILE).is_file(), mesh):
        problem = _agree(manifest.find_damage(source, _share(mesh)), mesh)
        if problem is not None:
            raise RuntimeError(
                f"{source}: must be as it was written; {problem}. Use another checkpoint."
            )
        return source
    folder = find(source, mesh)
    if folder is None:
        raise RuntimeError(
            f"{source}: must hold a checkpoint that can be loaded; there is none. Train it first."
        )
    return folder


def _read_state(folder: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if whole["format"] != _FORMAT:
        raise RuntimeError(
            f"{folder}: must have format {_FORMAT}; it has {whole['format']}. Use the version of "
            "this program that wrote it."
        )
    return whole


def _check_role(folder: Path, role: TrainState, mesh: Mesh) -> None:
    """Refuse a folder that does not hold just the tensors of a model."""
    problem, needed, held = _readable(folder, lambda: sharded.compare_role(folder, role, mesh))
    problem = _agree(problem, mesh)
    unused = held.difference(*_gather(needed, mesh))
    if problem is None and unused:
        problem = f"also holds {min(unused)}"
    if problem is not None:
        raise RuntimeError(
            f"{folder}: must hold the tensors of this model; it {problem}. Use the model settings "
            "of that run."
        )


def _readable(folder: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except CheckpointException as error:
        raise RuntimeError(
            f"{folder}: must be readable; {_reason(error)}. Use another checkpoint."
        ) from None


def _reason(error: BaseException) -> str:
    """Say in one line why torch could not write or read: its own message has tracebacks in it."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = min(error.failures.items())
        return f"rank {rank}: {_reason(inner)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _share(mesh: Mesh) -> slice:
    return slice(mesh.rank, None, mesh.world_size)


def _agree(problem: str | None, mesh: Mesh) -> str | None:
    """Return the first rank's problem on all ranks; which rank saw it does not matter."""
    first = agree_on_error(problem, mesh)
    return None if first is None else first.partition(": ")[2]


def _gather(value: T, mesh: Mesh) -> list[T]:
    parts: list[T] = [value] * mesh.world_size
    dist.all_gather_object(parts, value)
    return parts


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
