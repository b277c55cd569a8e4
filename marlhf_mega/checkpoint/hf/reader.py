"""The safetensors files of a Hugging Face folder, checked before any tensor is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from marlhf_mega.checkpoint.hf.table import Piece

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class HfReader:
    """Reads slices of tensors. Files are memory-mapped, so a slice costs only its own memory."""

    where: str
    """The first words of every error message, such as `model.hf_path=DIR`."""
    _slices: dict[str, Any]

    @property
    def names(self) -> set[str]:
        """Names of all tensors in the files."""
        return set(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return tuple(self._slices[name].get_shape())

    @property
    def dtypes(self) -> set[str]:
        """Number formats in the files, in safetensors' notation: F32, BF16."""
        return {part.get_dtype() for part in self._slices.values()}

    def read(self, piece: Piece) -> Tensor:
        """Return one piece on the CPU, in the file's number format."""
        assert piece.name is not None, "padding is not read"
        tensor: Tensor
        if piece.dim == 0:
            tensor = self._slices[piece.name][piece.lo : piece.hi]
        else:
            assert piece.dim == 1, piece
            tensor = self._slices[piece.name][:, piece.lo : piece.hi]
        return tensor


def open_folder(folder: Path, *, key: str = "model.hf_path") -> HfReader:
    """Open every weight file of a folder and read its header.

    Args:
        folder: has `model.safetensors`, or shards and their index.
        key: the config key that names the folder, for error messages.

    Raises:
        ValueError: no safetensors, only pickles, a missing or truncated shard, or an index that
            names a file outside the folder or a tensor that its file does not have.
    """
    where = f"{key}={folder}"
    slices: dict[str, Any] = {}
    for file, expected in _files(folder, where).items():
        path = folder / file
        if not path.is_file():
            raise ValueError(
                f"{where}: every shard must exist; {file} is missing. Download it again."
            )
        try:
            opened: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{where}: {file} must be a complete safetensors file; {error}. Download it again."
            ) from None
        names = set(opened.keys())
        if absent := sorted((expected or names) - names):
            raise ValueError(
                f"{where}: {INDEX_FILE} must match the shards; {file} has no {_some(absent)}. "
                "Download the folder again."
            )
        slices |= {name: opened.get_slice(name) for name in expected or names}
    return HfReader(where, slices)


def check_tensors(reader: HfReader, tensors: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the tensors in the files with those that the model needs.

    Args:
        reader: the open folder.
        tensors: names and shapes that the model needs.

    Raises:
        ValueError: a tensor is missing or has another shape.
    """
    if absent := [name for name in tensors if name not in reader.names]:
        raise ValueError(
            f"{reader.where}: the files must have every tensor of the model; {len(absent)} of "
            f"{len(tensors)} are missing: {_some(absent)}. Download the folder again."
        )
    for name, shape in tensors.items():
        if reader.shape(name) != shape:
            raise ValueError(
                f"{reader.where}: {name} must have shape {list(shape)} as config.json says; it has "
                f"{list(reader.shape(name))}. Use the config.json of these weights."
            )


def _files(folder: Path, where: str) -> dict[str, set[str] | None]:
    """Map file names to the tensors that the index lists for them; None without an index.

    Like transformers, it prefers the single file to shards.
    """
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ValueError(f"{where}: {_what_is_there(folder)}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if PurePath(file).name != file or file == "..":
                raise ValueError(
                    f"{where}: {INDEX_FILE} must name files in the folder; it names {file}. Do "
                    "not use this folder."
                )
            files.setdefault(file, set())
            expected = files[file]
            assert expected is not None
            expected.add(name)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: {INDEX_FILE} must hold a weight_map; {type(error).__name__}: {error}. "
            "Download it again."
        ) from None
    return files


def _what_is_there(folder: Path) -> str:
    if shards := sorted(path.name for path in folder.glob("*.safetensors")):
        return f"shards need {INDEX_FILE}; found {_some(shards)} without it. Download the index."
    if pickles := sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth")):
        return (
            f"weights must be safetensors; found only {_some(pickles)}, and pickles are never "
            "loaded. Convert it in an isolated environment: load it with transformers and call "
            "save_pretrained."
        )
    return f"weights must be {SINGLE_FILE} or shards with {INDEX_FILE}; found none. Download them."


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
