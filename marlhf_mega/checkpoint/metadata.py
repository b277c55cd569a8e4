"""Read the table of contents of a sharded checkpoint without executing it.

Torch stores that table, `.metadata`, as a pickle, and loading a pickle calls whatever it names. The
unpickler below refuses every name that such a table has no use for and replaces the others by inert
records, so that nothing is imported or called. Only a file that passes may be given to torch.
"""

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

CONTENTS = ".metadata"
OPTIMIZER = "optimizer.state."
"""What the names of an optimizer's tensors begin with."""

T = TypeVar("T")

_DCP = "torch.distributed.checkpoint"
_CLASSES = {
    f"{_DCP}.metadata.Metadata",
    f"{_DCP}.metadata.TensorStorageMetadata",
    f"{_DCP}.metadata.BytesStorageMetadata",
    f"{_DCP}.metadata.TensorProperties",
    f"{_DCP}.metadata.ChunkStorageMetadata",
    f"{_DCP}.metadata.MetadataIndex",
    f"{_DCP}.metadata.StorageMeta",
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
    f"{_DCP}.filesystem._StorageInfo",
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
}
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, MemoryError),
    *(ValueError, LookupError, TypeError, AttributeError, OverflowError),
)
"""What loading a pickle that was cut or changed raises."""


class RefusedTableError(Exception):
    """The file is not a plain table of contents; the text completes "it ..." in a message."""


class _Record:
    """Stands for an object that the pickle would create: what with, and its state."""

    arguments: tuple[Any, ...]
    state: dict[str, Any]

    def __new__(cls, *arguments: Any) -> Self:
        record = super().__new__(cls)
        record.arguments, record.state = arguments, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {"": state}


class _TableReader(pickle.Unpickler):
    """Creates records of throw-away classes; the pickle cannot reach a class of this process."""

    def find_class(self, module: str, name: str, /) -> Any:
        """Return a dtype or a new class of records; refuse any other name."""
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if f"{module}.{name}" not in _CLASSES:
            raise RefusedTableError(f"names {module}.{name}")
        return type(f"{module}.{name}", (_Record,), {})


@dataclass(frozen=True)
class TensorFacts:
    """Shape and dtype of a whole tensor, from the table."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    files: frozenset[str] = field(default=frozenset(), compare=False)
    """Names of the files that hold its elements."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_tensors(folder: Path) -> dict[str, TensorFacts]:
    """Return the global shape, dtype and files of every tensor in a sharded checkpoint, by name.

    Args:
        folder: has `.metadata` and the files that it lists.

    Raises:
        RuntimeError: the table names anything but the classes that such tables consist of, or lists
            objects other than tensors (which torch would unpickle) or files outside the folder.
    """
    path = folder / CONTENTS
    try:
        tensors = _contents(_load(path.read_bytes()))
        for file in frozenset[str]().union(*(facts.files for facts in tensors.values())):
            if Path(file).name != file:
                raise RefusedTableError(f"points to {file}")
            if not (folder / file).is_file():
                raise RefusedTableError(f"lists {file}, which is missing")
        return tensors
    except RefusedTableError as error:
        raise RuntimeError(
            f"{path}: must be a plain table of tensors; it {error}. It was not read; do not use "
            "this checkpoint."
        ) from None


def _load(data: bytes) -> Any:
    """Return the value of a pickle, made of records."""
    try:
        return _TableReader(io.BytesIO(data)).load()
    except _DAMAGE:
        raise RefusedTableError("is damaged") from None


def _expect(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise RefusedTableError("is damaged")
    return value


def _contents(table: Any) -> dict[str, TensorFacts]:
    """Return the tensors' facts."""
    state = _expect(_Record, table).state
    files = _files(_expect(dict, state.get("storage_data")))
    tensors: dict[str, TensorFacts] = {}
    for key, entry in _expect(dict, state.get("state_dict_metadata")).items():
        facts = _expect(_Record, entry)
        if type(facts).__name__ != f"{_DCP}.metadata.TensorStorageMetadata":
            raise RefusedTableError(f"lists {key}, which is not a tensor")
        (size,) = _expect(_Record, facts.state.get("size")).arguments
        shape = tuple(_expect(int, n) for n in _expect(tuple, size))
        dtype = _dtype(facts.state.get("properties"))
        tensors[_expect(str, key)] = TensorFacts(shape, dtype, frozenset(files.pop(key, ())))
    if files:
        raise RefusedTableError(f"places {min(files)}, which it does not list")
    return tensors


def _files(storage: Mapping[Any, Any]) -> dict[str, set[str]]:
    """Return the names of the files that hold a tensor's elements, by the tensor's name."""
    found: dict[str, set[str]] = {}
    for index, entry in storage.items():
        key = _expect(str, _expect(_Record, index).state.get("fqn"))
        place = _expect(_Record, entry).state
        if place.get("transform_descriptors"):
            raise RefusedTableError("asks for the files to be transformed")
        found.setdefault(key, set()).add(_expect(str, place.get("relative_path")))
    return found


def _dtype(properties: Any) -> torch.dtype:
    """Return the dtype from a tensor's properties, which torch stores as a plain tuple."""
    values = _expect(_Record, properties).state.get("")
    return _expect(torch.dtype, _expect(tuple, values)[0])
