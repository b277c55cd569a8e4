"""What the run directory or Hugging Face folder of a model holds, read without communication.

Needs no Megatron, so that a job can be checked before it is loaded.
"""

import json
from pathlib import Path
from typing import Any

import torch

from marlhf_mega.checkpoint import folders, manifest
from marlhf_mega.checkpoint.hf.reader import open_folder
from marlhf_mega.checkpoint.metadata import OPTIMIZER, read_tensors
from marlhf_mega.config.origin import Origin

SCALAR_ROLES = ("reward", "critic")
"""Roles whose models have a scalar head."""
FORMAT = 1


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state that was passed to `Saver.save`. Does not communicate.

    Args:
        folder: a checkpoint that `find` returned, and so verified.
    """
    state: dict[str, Any] = read_whole(folder)["state"]
    return state


def newest_state(run_dir: Path) -> dict[str, Any] | None:
    """Return the state of the checkpoint that a run would most likely resume from.

    Unlike `find` it verifies the JSON files only, and does not communicate.
    """
    folder = _newest(run_dir)
    return None if folder is None else read_state(folder)


def stored_dtype(run_dir: Path, role: str) -> torch.dtype | None:
    """Return the number format of a model's weights in a run's newest checkpoint; None without one.

    Reads tables only and does not communicate.

    Raises:
        RuntimeError: the model's table is not a plain table of tensors.
    """
    folder = _newest(run_dir)
    if folder is None or not (folder / role).is_dir():
        return None
    table = read_tensors(folder / role)
    return next(f.dtype for name, f in table.items() if not name.startswith(OPTIMIZER))


def roles_of(origin: Origin, *, key: str) -> set[str]:
    """Return the roles whose weights an origin holds: of a folder, `policy` or `reward`.

    Raises:
        ValueError: the weight files cannot be opened.
    """
    if not origin.is_run:
        is_scalar = "score.weight" in open_folder(origin.path, key=key).names
        return {"reward" if is_scalar else "policy"}
    checkpoints = (origin.path / "checkpoints").iterdir()
    return {role for c in checkpoints for role in ("policy", *SCALAR_ROLES) if (c / role).is_dir()}


def read_whole(folder: Path) -> dict[str, Any]:
    """Return `state.json` of a checkpoint: the state, and what is known of its models."""
    whole: dict[str, Any] = json.loads((folder / manifest.STATE).read_text(encoding="utf-8"))
    if whole["format"] != FORMAT:
        raise RuntimeError(
            f"{folder}: must have format {FORMAT}; it has {whole['format']}. Use the version of "
            "marlhf-mega that wrote it."
        )
    return whole


def _newest(run_dir: Path) -> Path | None:
    root = run_dir / "checkpoints"
    for name in folders.candidates(root)[0]:
        try:
            expected = manifest.read(root / name)["files"][manifest.STATE]
        except ValueError:
            continue
        if manifest.check_file(root / name, manifest.STATE, expected) is None:
            return root / name
    return None
