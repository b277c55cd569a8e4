"""Rows of data sets of the Hugging Face Hub, or of a folder in its form, by `datasets`."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

_FORM = "hf://NAME:SPLIT or hf://NAME/SUBSET:SPLIT"


def read_hub(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of `hf://NAME:SPLIT`, where NAME is `org/name` or a folder.

    `hf://org/name/subset:split` names one of several configurations of a data set. Files that are
    in the cache of `datasets` are not downloaded again.

    Raises:
        ValueError: `datasets` is not installed or cannot load the data set.
    """
    yield from _load(path)


def hub_hash(path: str) -> str:
    """Return the sha256 of all rows of a data set.

    Raises:
        ValueError: as `read_hub` does.
    """
    digest = hashlib.sha256()
    for row in read_hub(path):
        digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()


def _load(path: str) -> Any:
    name, _, split = path.removeprefix("hf://").partition(":")
    if not (name and split):
        raise ValueError(
            f"{path}: must be {_FORM}; its split is missing. Write for example :train."
        )
    try:
        import datasets  # optional, and slow to import
    except ImportError as error:
        raise ValueError(
            f"{path}: needs the library datasets; {error}. Run pip install 'marlhf-mega[hub]', or "
            "give a .jsonl or .parquet file."
        ) from None
    folder = name.startswith(("/", "."))
    org, subset = (name, "") if folder else _split_subset(name)
    try:
        return datasets.load_dataset(org, subset or None, split=split)
    except Exception as error:  # whatever a download or a builder raises
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{path}: must be a data set that datasets can load; {reason}. Check its name, its "
            "split and the network, or give a .jsonl or .parquet file."
        ) from error


def _split_subset(name: str) -> tuple[str, str]:
    """Split `org/name/subset` into `org/name` and `subset`, which may be missing."""
    parts = name.split("/", 2)
    return "/".join(parts[:2]), parts[2] if len(parts) > 2 else ""
