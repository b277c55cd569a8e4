"""Find and load the checkpoints of a run; `marlhf_mega.checkpoint.saver` writes them.

`step_000012/` has one folder per trained model, `state.json` with the rest of the run's state, and
`manifest.json` with the size and sha256 of every file. It is written as `step_000012.tmp` and
renamed when complete; then `latest`, which holds the folder's name, is replaced. Whenever the run
is killed, the folder that `latest` names, or the one that it named before, is complete.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from marlhf_mega.checkpoint import folders, manifest, optimizer_state, sharded
from marlhf_mega.checkpoint.contents import SCALAR_ROLES, read_whole
from marlhf_mega.checkpoint.hf.adapters import is_same_base
from marlhf_mega.checkpoint.hf.parameters import is_own
from marlhf_mega.checkpoint.metadata import TensorFacts, read_tensors
from marlhf_mega.config.load import ConfigError
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import agree_on_error, broadcast_object, gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.platform import local_rank

logger = logging.getLogger(__name__)


def find(run_dir: Path, mesh: Mesh) -> Path | None:
    """Return the best intact checkpoint, None if there is no checkpoint. All ranks call it.

    The best is the one that `latest` names, else an older one, else a newer one. One warning names
    the damaged ones.

    Raises:
        RuntimeError: all checkpoints are damaged.
    """
    return _find(run_dir, mesh, lambda folder: manifest.find_damage(folder, _share(mesh)))


def _find(run_dir: Path, mesh: Mesh, find_damage: Callable[[Path], str | None]) -> Path | None:
    root = run_dir / "checkpoints"
    names, remarks = broadcast_object(folders.candidates(root))
    for name in names:
        problem = agree_on_error(find_damage(root / name))
        if problem is None:
            if remarks and mesh.rank == 0:
                logger.warning("%s: %s; using %s", root, "; ".join(remarks), name)
            return root / name
        remarks.append(f"{name} is damaged, {problem}")
    if not names:
        return None
    later, _ = broadcast_object(folders.candidates(root))
    if not set(later) <= set(names):
        # A run is still writing here: it has removed these checkpoints and written newer ones.
        return _find(run_dir, mesh, find_damage)
    raise RuntimeError(
        f"{root}: must hold an intact checkpoint; {'; '.join(remarks)}. Restore a file from a "
        "copy, or use another run.dir to start afresh."
    )


def load(
    folder: Path,
    roles: Mapping[str, sharded.Saveable],
    mesh: Mesh,
    *,
    required: Sequence[str] = (),
) -> dict[str, Any]:
    """Restore models, at this or another layout. All ranks call it.

    At the layout of the save, training resumes bit-exactly. Hyper-parameters are those of the
    current config; the learning rate is that of its schedule at the saved step.

    Args:
        folder: a checkpoint that `find` returned, and so verified.
        roles: the models to restore, built as for a fresh start; of those given as chunks there
            are only weights.
        mesh: this rank's mesh.
        required: keys that the state must have.

    Returns:
        The state that was passed to `Saver.save`.

    Raises:
        ConfigError: adapters belong to other weights.
        RuntimeError: a model, a tensor or a key is missing, or the checkpoint has tensors that the
            model does not have.
    """
    whole = read_whole(folder)
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
        if isinstance(role, TrainState):
            _check_base(folder / name, whole["roles"][name], role.base_digest)
        _check_role(folder / name, role, mesh)
    for name, role in roles.items():
        if not isinstance(role, TrainState):
            sharded.load_chunks(folder / name, role, mesh, absent=set())
            continue
        sharded.load_role(folder / name, role, mesh)
        progress = whole["roles"][name]
        optimizer_state.set_steps_taken(role, progress["optimizer_steps"])
        role.schedule.num_steps = 0
        role.schedule.step(increment=progress["schedule_steps"])
    state: dict[str, Any] = whole["state"]
    return state


def load_weights(
    source: Path, chunks: Sequence[StageModel], mesh: Mesh, *, role: str | None = None
) -> list[str]:
    """Fill a model with trained weights, at any layout. All ranks call it.

    Verifies only the files that it reads: a run's other models and its optimizer states, which are
    most of a checkpoint, cost no time.

    Args:
        source: a run directory, or the folder of one checkpoint.
        chunks: this rank's chunks, not wrapped for training; a scalar head keeps its values if
            the checkpoint has none.
        mesh: this rank's mesh.
        role: the role whose weights to load; None means the first one that fits the head.

    Returns:
        Names of the tensors that the checkpoint does not have, the same on every rank.

    Raises:
        ConfigError: it has adapters of other weights.
        RuntimeError: there is no checkpoint, it is damaged, or it lacks any other tensor.
    """
    suitable = ("policy",) if chunks[0].head == "language" else (*SCALAR_ROLES, "policy")
    wanted = suitable if role is None else (role,)
    folder = _resolve(source, wanted, mesh)
    held = read_whole(folder)["roles"]
    name = next((name for name in wanted if name in held), None)
    if name is None:
        raise RuntimeError(
            f"{folder}: must hold the model {' or '.join(wanted)}; it has {', '.join(held)}. "
            "Use another run."
        )
    _check_base(folder / name, held[name], chunks[0].base_digest)
    table = _read_table(folder / name, mesh)
    parts = gather_objects(sharded.compare_weights(table, chunks, mesh))
    absent = {tensor: problem for part in parts for tensor, problem in part.items()}
    for tensor, problem in absent.items():
        if chunks[0].head == "language" or not (tensor == sharded.HEAD or is_own(tensor)):
            raise RuntimeError(
                f"{folder / name}: must hold the weights of this model; it {problem}. Use the "
                "model settings of that run."
            )
    sharded.load_chunks(folder / name, chunks, mesh, absent=set(absent))
    return sorted(absent)


def _resolve(source: Path, wanted: Sequence[str], mesh: Mesh) -> Path:
    """Return a checkpoint of a run directory, or the folder of one, with intact weights."""
    find_damage = partial(_find_damaged_weights, wanted=wanted, mesh=mesh)
    if broadcast_object((source / manifest.FILE).is_file()):
        problem = agree_on_error(find_damage(source))
        if problem is not None:
            raise RuntimeError(f"{source}: must be intact; {problem}. Use another checkpoint.")
        return source
    folder = _find(source, mesh, find_damage)
    if folder is None:
        raise RuntimeError(
            f"{source}: must hold a checkpoint; there is none. Train the model first."
        )
    return folder


def _find_damaged_weights(folder: Path, wanted: Sequence[str], mesh: Mesh) -> str | None:
    """Return what is wrong with the files that weights are read from. All ranks call it.

    Args:
        folder: a checkpoint.
        wanted: roles, of which the first that the checkpoint has is read.
        mesh: this rank's mesh.
    """
    problem = agree_on_error(manifest.find_damage(folder, only=[manifest.STATE]))
    if problem is not None:
        return problem
    held = read_whole(folder)["roles"]
    name = next((name for name in wanted if name in held), None)
    if name is None:
        return None
    tables = [f"{name}/{file}" for file in sharded.TABLES]
    problem = agree_on_error(manifest.find_damage(folder, only=tables))
    if problem is not None:
        return problem
    files = sharded.files_of_weights(_read_table(folder / name, mesh))
    return manifest.find_damage(folder, _share(mesh), only=[f"{name}/{file}" for file in files])


def _read_table(folder: Path, mesh: Mesh) -> dict[str, TensorFacts]:
    """Return a role's checked table of contents. All ranks call it.

    One rank of each machine interprets it: that takes seconds for large models on many ranks.
    """
    table, problem = None, None
    if mesh.rank == 0 or local_rank() == 0:
        try:
            table = read_tensors(folder)
        except (OSError, RuntimeError) as error:
            problem = str(error)
    problem = agree_on_error(problem)
    if problem is not None:
        raise RuntimeError(problem)
    table = broadcast_object(table)
    assert table is not None
    return table


def _check_base(folder: Path, saved: Mapping[str, Any], digest: str | None) -> None:
    """Raise unless adapters belong to the frozen weights that they are loaded for."""
    expected = saved.get("base_digest")
    if not is_same_base(expected, digest):
        raise ConfigError(
            f"{folder}: must be of the weights of this model; it has adapters of a base with hash "
            f"{expected}, and this model's is {digest}. Use the model.hf_path or model.init that "
            "the run began from, unchanged, and its precision.dtype."
        )


def _check_role(folder: Path, role: sharded.Saveable, mesh: Mesh) -> None:
    """Raise unless a folder holds exactly the tensors of a model."""
    table = _read_table(folder, mesh)
    problem, needed = sharded.compare_role(table, role, mesh)
    problem = agree_on_error(problem)
    unused = table.keys() - set().union(*gather_objects(needed))
    if problem is None and unused:
        problem = f"also holds {min(unused)}"
    if problem is not None:
        raise RuntimeError(
            f"{folder}: must hold the tensors of this model; it {problem}. Use the model settings "
            "of that run."
        )


def _share(mesh: Mesh) -> slice:
    return slice(mesh.rank, None, mesh.world_size)
