"""The folders of `run.dir/checkpoints`: begun, committed, found and removed. No communication."""

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from marlhf_mega.checkpoint import durable, manifest

logger = logging.getLogger(__name__)

_LATEST = "latest"


def path_of(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return root / f"step_{step:06d}"


def temporary_of(folder: Path) -> Path:
    """Return where a checkpoint is written, or removed, while it is not whole."""
    return folder.with_name(folder.name + ".tmp")


def remove_leftovers(root: Path) -> None:
    """Make the folder of checkpoints, or remove from it what killed saves left."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob("step_*.tmp"):
        shutil.rmtree(leftover)


def begin(folder: Path, roles: Sequence[str]) -> None:
    """Make the temporary folder of a checkpoint with one folder per role."""
    for role in roles:
        (temporary_of(folder) / role).mkdir(parents=True)


def commit(folder: Path, text: str) -> None:
    """Turn a complete temporary folder into the latest checkpoint.

    Args:
        folder: the checkpoint's final path.
        text: of the manifest.
    """
    temporary = temporary_of(folder)
    durable.write(temporary / manifest.FILE, text)
    for part in (*(path for path in temporary.iterdir() if path.is_dir()), temporary):
        durable.sync(part)
    if folder.exists():
        # The step is done again after an older checkpoint was used. `candidates` knows both names.
        durable.rename(folder, folder.with_name(folder.name + ".old"))
    durable.rename(temporary, folder)
    durable.replace(folder.with_name(_LATEST), folder.name + "\n")


def rotate(root: Path, step: int, *, keep: int, keep_every: int) -> None:
    """Remove old checkpoints; what cannot be removed is named in a warning.

    Args:
        root: the folder of checkpoints.
        step: of the latest; later ones are of a future that was given up, and stay until then.
        keep: newest checkpoints that stay.
        keep_every: multiples of this stay too; 0: none.
    """
    steps = sorted(s for s, current in _checkpoints(root).values() if current and s <= step)
    gone = [s for s in steps[:-keep] if not (keep_every and s % keep_every == 0)]
    for folder in (*(path_of(root, s) for s in gone), *root.glob("step_*.old")):
        try:
            # Renamed first: a folder that is partly removed must not look damaged.
            folder.rename(temporary_of(folder))
            shutil.rmtree(temporary_of(folder))
        except OSError as error:
            logger.warning("%s could not be removed: %s", folder, error)


def candidates(root: Path) -> tuple[list[str], list[str]]:
    """Return the names of the checkpoints, best first, and what is wrong with `latest`.

    The best is the one that `latest` names, then come older ones, then newer ones.
    """
    if not root.is_dir():
        return [], []
    known = _checkpoints(root)
    names = sorted(known, key=lambda name: known[name], reverse=True)
    try:
        latest = (root / _LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        # Killed before the first pointer was written: the folders tell as much.
        return names, []
    if latest not in known:
        return names, [f"{_LATEST} names no checkpoint ({latest[:40]!r})"]
    newer = [name for name in names if known[name] > known[latest]]
    return [name for name in names if name not in newer] + newer, []


def _checkpoints(root: Path) -> dict[str, tuple[int, bool]]:
    """Return the step of every folder by its name, and whether it was not set aside."""
    found = (re.fullmatch(r"step_(\d{6,})(\.old)?", path.name) for path in root.iterdir())
    return {match[0]: (int(match[1]), match[2] is None) for match in found if match}
