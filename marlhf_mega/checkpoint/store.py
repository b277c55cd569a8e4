"""Checkpoints of a run: sharded by Megatron, verified by checksums, committed by one rename.

`step_000012/` holds one folder per trained model, `state.json` with everything else a run consists
of, and `manifest.json` with the size and sha256 of every file. It is written as `step_000012.tmp`
and renamed when complete; then `latest` is replaced. A folder under its final name is complete.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import WorldPeers, agree_on_error, share_from_first
from marlhf_mega.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"


def save(
    run_dir: Path,
    step: int,
    roles: Mapping[str, TrainState],
    state: Mapping[str, Any],
    mesh: Mesh,
    *,
    keep: int,
) -> Path:
    """Write one checkpoint and make it the latest. All ranks call it.

    Args:
        run_dir: the run directory.
        step: steps that are done.
        roles: the trained models by name.
        state: JSON values: data position, controllers, counters.
        mesh: where this rank stands.
        keep: newest checkpoints that stay.

    Returns:
        The folder.

    Raises:
        RuntimeError: writing failed on some rank; earlier checkpoints are untouched.
    """
    root = run_dir / "checkpoints"
    target = root / f"step_{step:06d}"
    temporary = target.with_name(target.name + ".tmp")
    _together(mesh, lambda: _begin(temporary, roles), first=True)
    for name, role in roles.items():
        _together(mesh, lambda n=name, r=role: _save_role(temporary / n, r, mesh))  # type: ignore[misc]
    schedules = {name: role.schedule.state_dict() for name, role in roles.items()}
    whole = {**state, "schedules": schedules}
    files = WorldPeers(mesh).gather(_hash_share(temporary, mesh))
    manifest = {name: facts for part in files for name, facts in part.items()}
    _together(mesh, lambda: _commit(temporary, target, whole, manifest, mesh), first=True)
    _together(mesh, lambda: _rotate(root, target, keep), first=True)
    return target


def find(run_dir: Path, mesh: Mesh) -> Path | None:
    """Return the newest checkpoint whose files are all as they were written. All ranks call it.

    A damaged one is named in a warning and an older one is taken.
    """
    root = run_dir / "checkpoints"
    folders = sorted((p for p in root.glob("step_*") if p.suffix != ".tmp"), reverse=True)
    names = share_from_first([p.name for p in folders], mesh)
    for name in names:
        problem = agree_on_error(_damage(root / name, mesh), mesh)
        if problem is None:
            return root / name
        if mesh.rank == 0:
            logger.warning("%s is damaged: %s; trying an older one", root / name, problem)
    return None


def load(folder: Path, roles: Mapping[str, TrainState], mesh: Mesh) -> dict[str, Any]:
    """Restore the trained models, at this or another layout. All ranks call it.

    Args:
        folder: from `find`.
        roles: the models to restore, built as for a fresh start.
        mesh: where this rank stands.

    Returns:
        The state that was given to `save`.

    Raises:
        RuntimeError: the checkpoint lacks a model.
    """
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    for name, role in roles.items():
        if not (folder / name).is_dir():
            raise RuntimeError(
                f"{folder}: must hold the model {name}; it has no such folder. Use a checkpoint "
                "of the same job."
            )
        _load_role(folder / name, role, mesh)
        role.schedule.load_state_dict(state["schedules"][name])
        _restore_step_counts(role, role.schedule.num_steps)
    del state["schedules"]
    return state


def load_weights(run_dir: Path, chunks: Sequence[StageModel], mesh: Mesh) -> list[str]:
    """Fill a model with the weights that a run has trained, at any layout. All ranks call it.

    Args:
        run_dir: of an sft, reward or ppo run.
        chunks: this rank's chunks; a scalar head keeps its values if the run has none.
        mesh: where this rank stands.

    Returns:
        Names of the tensors that the checkpoint does not have.

    Raises:
        RuntimeError: there is no checkpoint, or it lacks something else.
    """
    folder = find(run_dir, mesh)
    if folder is None:
        raise RuntimeError(
            f"{run_dir}: must hold a checkpoint that can be loaded; there is none. Train it first."
        )
    wanted = ("policy",) if chunks[0].head == "language" else ("reward", "critic", "policy")
    role = next((name for name in wanted if (folder / name).is_dir()), None)
    if role is None:
        raise RuntimeError(
            f"{folder}: must hold one of {', '.join(wanted)}; it has none. Name another run."
        )
    headless = chunks[0].head == "scalar" and role == "policy"
    sharded = _model_state(chunks, mesh)
    fresh = sorted(k for part in sharded.values() for k in part if "output_layer" in k)
    if headless:
        for part in sharded.values():
            for key in [k for k in part if "output_layer" in k]:
                del part[key]
    loaded = dist_checkpointing.load(sharded, str(folder / role))
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{index}"], strict=not headless)
    return fresh if headless else []


def _metadata(mesh: Mesh) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": mesh.groups.dp_cp,
    }


def _model_state(chunks: Sequence[StageModel], mesh: Mesh) -> dict[str, Any]:
    return {
        f"model{index}": chunk.sharded_state_dict(metadata=_metadata(mesh))
        for index, chunk in enumerate(chunks)
    }


def _save_role(folder: Path, role: TrainState, mesh: Mesh) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = _model_state([ddp.module for ddp in role.chunks], mesh)
    models = dict(state)
    state["optimizer"] = role.optimizer.sharded_state_dict(
        _flat(models), is_loading=False, metadata=_metadata(mesh)
    )
    dist_checkpointing.save(state, str(folder))


def _flat(models: dict[str, Any]) -> dict[str, Any]:
    """The optimizer looks parameters up in one dictionary, or in one per virtual stage."""
    return models["model0"] if len(models) == 1 else models


def _load_role(folder: Path, role: TrainState, mesh: Mesh) -> None:
    modules = [ddp.module for ddp in role.chunks]
    state = _model_state(modules, mesh)
    models = dict(state)
    _fill_empty_states(role)
    state["optimizer"] = role.optimizer.sharded_state_dict(
        _flat(models), is_loading=True, metadata=_metadata(mesh)
    )
    loaded = dist_checkpointing.load(state, str(folder))
    for index, module in enumerate(modules):
        module.load_state_dict(loaded[f"model{index}"])
    role.optimizer.load_state_dict(loaded["optimizer"])


def _torch_optimizers(role: TrainState) -> list[torch.optim.Optimizer]:
    parts = getattr(role.optimizer, "chained_optimizers", [role.optimizer])
    return [part.optimizer for part in parts if part.optimizer is not None]


def _fill_empty_states(role: TrainState) -> None:
    """Give AdamW the state it makes at its first step: Megatron loads into what is there."""
    for optimizer in _torch_optimizers(role):
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _restore_step_counts(role: TrainState, num_steps: int) -> None:
    """Give each parameter a step counter of its own; Megatron leaves them one they all share."""
    for optimizer in _torch_optimizers(role):
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(num_steps), device=state["step"].device)


def _begin(temporary: Path, roles: Mapping[str, TrainState]) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    needed = sum(
        p.numel() * (p.element_size() + 12)
        for r in roles.values()
        for c in r.chunks
        for p in c.parameters()
    )
    free = shutil.disk_usage(temporary).free
    if free < needed:
        raise OSError(f"{temporary}: needs {needed} bytes; {free} are free")


def _hash_share(folder: Path, mesh: Mesh) -> dict[str, dict[str, Any]]:
    """Hash and flush this rank's share of the files; the ranks take turns."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        str(path.relative_to(folder)): _facts(path) for path in files[mesh.rank :: mesh.world_size]
    }


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"sha256": digest, "bytes": file.seek(0, os.SEEK_END)}


def _commit(
    temporary: Path,
    target: Path,
    state: Mapping[str, Any],
    files: dict[str, Any],
    mesh: Mesh,
) -> None:
    _write_durably(temporary / STATE, json.dumps(state, indent=1))
    files[STATE] = _facts(temporary / STATE)
    manifest = {"layout": mesh.describe(), "files": files}
    _write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1))
    if target.exists():
        shutil.rmtree(target)
    temporary.rename(target)
    pointer = target.with_name("latest.tmp")
    _write_durably(pointer, target.name + "\n")
    pointer.rename(target.with_name("latest"))
    _sync_folder(target.parent)


def _rotate(root: Path, newest: Path, keep: int) -> None:
    folders = sorted(p for p in root.glob("step_*") if p.suffix != ".tmp" and p != newest)
    for folder in folders[: max(0, len(folders) - keep + 1)]:
        shutil.rmtree(folder)


def _damage(folder: Path, mesh: Mesh) -> str | None:
    """Say what is wrong with this rank's share of the files, none if nothing is."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST}: {error}"
    for name in sorted(files)[mesh.rank :: mesh.world_size]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _facts(path) != files[name]:
            return f"{name} has changed since it was written"
    return None


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _together(mesh: Mesh, work: Callable[[], None], *, first: bool = False) -> None:
    """Run on all ranks, or on the first alone; if one fails, all raise."""
    error = None
    if mesh.rank == 0 or not first:
        try:
            work()
        except OSError as problem:
            error = f"checkpoint: could not be written; {problem}. Free or mend the disk."
    failed = agree_on_error(error, mesh)
    if failed is not None:
        raise RuntimeError(failed)
