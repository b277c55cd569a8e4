"""File operations that survive a crash of the machine: flushed, and visible all at once."""

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, text: str) -> None:
    """Write a file so that a reader, also after a crash, finds the old or the new text."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary, text)
    temporary.replace(path)
    sync(path.parent)


def rename(source: Path, target: Path) -> None:
    """Rename within a folder and wait until the folder is on the disk."""
    source.rename(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
