"""The folders in `run.dir/checkpoints`: created, committed, found and removed. No communication."""

import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from marlhf_mega import durable
from marlhf_mega.checkpoint import manifest

logger = logging.getLogger(__name__)

_LATEST = "latest"


def path_of(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return root / f"step_{step:06d}"


def latest_of(run_dir: Path) -> Path:
    """Return the file that names the latest checkpoint of a run."""
    return run_dir / "checkpoints" / _LATEST


def temporary_of(folder: Path) -> Path:
    """Return the folder that holds a checkpoint while it is incomplete or being removed."""
    return folder.with_name(folder.name + ".tmp")


def remove_leftovers(root: Path) -> None:
    """Create the folder of checkpoints, or remove what interrupted saves left in it."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob("step_*.tmp"):
        _remove(leftover)


def begin(folder: Path, roles: Sequence[str]) -> None:
    """Create the temporary folder of a checkpoint with one folder per role."""
    for role in roles:
        (temporary_of(folder) / role).mkdir(parents=True)


def commit(folder: Path, text: str) -> None:
    """Make a complete temporary folder the latest checkpoint.

    Args:
        folder: the checkpoint's final path.
        text: the manifest's text.
    """
    temporary = temporary_of(folder)
    durable.write(temporary / manifest.FILE, text)
    for part in (*(path for path in temporary.iterdir() if path.is_dir()), temporary):
        durable.sync(part)
    if folder.exists():
        # The run resumed from an older checkpoint and repeated the step. `candidates` finds both.
        aside = folder.with_name(folder.name + ".old")
        _remove(aside)  # of a save that was killed before it could remove it
        durable.rename(folder, aside)
    durable.rename(temporary, folder)
    durable.replace(folder.with_name(_LATEST), folder.name + "\n")


def _remove(folder: Path) -> None:
    """Remove a folder, or a stray file of its name, if there is one."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def rotate(root: Path, step: int, *, keep: int, keep_every: int, best: int | None = None) -> None:
    """Remove old checkpoints; warn about those that cannot be removed.

    Args:
        root: the folder of checkpoints.
        step: the latest step. Later ones belong to an abandoned continuation; the run overwrites
            them when it gets there.
        keep: number of newest checkpoints to keep.
        keep_every: also keep steps that are a multiple of this; 0 means none.
        best: a step that is kept in any case.
    """
    steps = sorted(s for s, current in _checkpoints(root).values() if current and s <= step)
    gone = [s for s in steps[:-keep] if s != best and not (keep_every and s % keep_every == 0)]
    for folder in (*(path_of(root, s) for s in gone), *root.glob("step_*.old")):
        try:
            # Renamed first, so that a partly removed folder does not look like a damaged one.
            folder.rename(temporary_of(folder))
            shutil.rmtree(temporary_of(folder))
        except OSError as error:
            logger.warning("%s could not be removed: %s", folder, error)


def candidates(root: Path) -> tuple[list[str], list[str]]:
    """Return the names of the checkpoints, best first, and what is wrong with `latest`.

    The order is: the one that `latest` names, older ones, newer ones.
    """
    if not root.is_dir():
        return [], []
    known = _checkpoints(root)
    names = sorted(known, key=lambda name: known[name], reverse=True)
    try:
        latest = (root / _LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        # Killed before the first pointer was written.
        return names, []
    if latest not in known:
        return names, [f"{_LATEST} names no checkpoint ({latest[:40]!r})"]
    newer = [name for name in names if known[name] > known[latest]]
    return [name for name in names if name not in newer] + newer, []


def _checkpoints(root: Path) -> dict[str, tuple[int, bool]]:
    """Map the name of every folder to its step and whether it is current, not set aside."""
    found = (re.fullmatch(r"step_(\d{6,})(\.old)?", path.name) for path in root.iterdir())
    return {match[0]: (int(match[1]), match[2] is None) for match in found if match}
