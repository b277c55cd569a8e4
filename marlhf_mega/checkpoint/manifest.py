"""The manifest of a checkpoint: size and sha256 of every file, and where it came from."""

import contextlib
import hashlib
import json
import platform
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE = "manifest.json"
STATE = "state.json"
"""Everything except the models."""

Facts = dict[str, Any]
"""`bytes` and `sha256` of one file."""


def facts(path: Path) -> Facts:
    """Return the size and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def make(files: Mapping[str, Facts], **about: Any) -> str:
    """Return a manifest's text.

    Args:
        files: facts by relative path.
        about: JSON values that describe where the checkpoint came from.
    """
    body = {**about, "versions": versions(), "files": dict(sorted(files.items()))}
    return json.dumps({**body, "sha256": _checksum(body)}, indent=1)


def read(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest.

    Raises:
        ValueError: it is missing or has changed; the text names the file.
    """
    try:
        body: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        written = body.pop("sha256")
    except FileNotFoundError:
        raise ValueError(f"{FILE} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{FILE} cannot be read") from None
    if _checksum(body) != written:
        raise ValueError(f"{FILE} has changed since it was written")
    return body


def find_damage(
    folder: Path, share: slice = slice(None), *, only: Collection[str] | None = None
) -> str | None:
    """Compare a checkpoint with its manifest.

    Args:
        folder: the checkpoint.
        share: which files to check besides `manifest.json`, so that ranks can share the work.
        only: names of the files that will be read; None means all.

    Returns:
        The first file that has changed and what is wrong with it; None if there is none.
    """
    try:
        files = read(folder)["files"]
    except ValueError as error:
        return str(error)
    if only is not None and not files.keys() >= set(only):
        return f"{FILE} lacks {min(set(only) - files.keys())}"
    wanted = files if only is None else only
    largest_first = sorted(wanted, key=lambda name: (-files[name]["bytes"], name))
    problems = (check_file(folder, name, files[name]) for name in largest_first[share])
    return next(filter(None, problems), None)


def check_file(folder: Path, name: str, expected: Facts) -> str | None:
    """Return what is wrong with a file of a checkpoint, with its name; None if nothing is."""
    problem = _compare(folder / name, expected)
    return None if problem is None else f"{name} {problem}"


def _compare(path: Path, expected: Facts) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"has {size} bytes instead of {expected['bytes']}"
        if facts(path) != expected:
            return "has changed since it was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run depends on most."""
    found = {"python": platform.python_version()}
    for name in ("torch", "megatron-core", "marlhf-mega"):
        # This package may run from its source without being installed.
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
