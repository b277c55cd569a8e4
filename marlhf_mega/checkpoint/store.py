"""Checkpoints of a run, found and loaded; `marlhf_mega.checkpoint.saver` writes them.

`step_000012/` holds one folder per trained model, `state.json` with everything else a run consists
of, and `manifest.json` with the size and sha256 of every file. It is written as `step_000012.tmp`
and renamed when complete; then `latest`, which holds the folder's name, is replaced. Whenever the
run is killed, the folder that `latest` names, or the one that it named before, is complete.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from marlhf_mega.checkpoint import folders, manifest, optimizer_state, sharded
from marlhf_mega.checkpoint.together import first_problem, reason
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import share_from_first
from marlhf_mega.parallel.mesh import Mesh

T = TypeVar("T")

logger = logging.getLogger(__name__)

SCALAR_ROLES = ("reward", "critic")
"""Roles whose models end in one number."""
FORMAT = 1


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
        problem = first_problem(manifest.find_damage(root / name, _share(mesh)), mesh)
        if problem is None:
            if remarks and mesh.rank == 0:
                logger.warning("%s: %s; using %s", root, "; ".join(remarks), name)
            return root / name
        remarks.append(f"{name} is damaged, {problem}")
    if not names:
        return None
    later, _ = share_from_first(folders.candidates(root), mesh)
    if not set(later) <= set(names):
        # The run still goes on: it has removed what was found, and written newer ones.
        return find(run_dir, mesh)
    raise RuntimeError(
        f"{root}: must hold a checkpoint that is as it was written; {'; '.join(remarks)}. Restore "
        "a file from a copy, or use another run.dir to start afresh."
    )


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state that was given to `Saver.save`. Does not communicate.

    Args:
        folder: from `find`, which has verified it.
    """
    state: dict[str, Any] = _read_state(folder)["state"]
    return state


def newest_state(run_dir: Path) -> dict[str, Any] | None:
    """Return the state of the checkpoint that a run would most likely go on from.

    Reads its tables only, where `find` verifies the weights too, and does not communicate.
    """
    root = run_dir / "checkpoints"
    for name in folders.candidates(root)[0]:
        try:
            expected = manifest.read(root / name)["files"][manifest.STATE]
        except ValueError:
            continue
        if manifest.check_file(root / name, manifest.STATE, expected) is None:
            return read_state(root / name)
    return None


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
        The state that was given to `Saver.save`.

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


def _resolve(source: Path, mesh: Mesh) -> Path:
    """Return the verified checkpoint that a run directory or a checkpoint folder stands for."""
    if share_from_first((source / manifest.FILE).is_file(), mesh):
        problem = first_problem(manifest.find_damage(source, _share(mesh)), mesh)
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
    whole: dict[str, Any] = json.loads((folder / manifest.STATE).read_text(encoding="utf-8"))
    if whole["format"] != FORMAT:
        raise RuntimeError(
            f"{folder}: must have format {FORMAT}; it has {whole['format']}. Use the version of "
            "this program that wrote it."
        )
    return whole


def _check_role(folder: Path, role: TrainState, mesh: Mesh) -> None:
    """Refuse a folder that does not hold just the tensors of a model."""
    problem, needed, held = _readable(folder, lambda: sharded.compare_role(folder, role, mesh))
    problem = first_problem(problem, mesh)
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
            f"{folder}: must be readable; {reason(error)}. Use another checkpoint."
        ) from None


def _share(mesh: Mesh) -> slice:
    return slice(mesh.rank, None, mesh.world_size)


def _gather(value: T, mesh: Mesh) -> list[T]:
    parts: list[T] = [value] * mesh.world_size
    dist.all_gather_object(parts, value)
    return parts
