"""File operations that survive a crash of the machine: flushed, and visible all at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Yield a path to write to; when the block ends, that file takes the place of `path`.

    A reader finds the old file or the new one, never a part. If the block raises, the old stays.

    Args:
        path: the file to replace, or to create.
        flush: wait for the disk, so that this also holds after a crash of the machine and not only
            of the process.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        if flush:
            sync(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    if flush:
        sync(path.parent)


def replace(path: Path, text: str, *, flush: bool = True) -> None:
    """Replace a file's text, see `replacing`."""
    with replacing(path, flush=flush) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


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
