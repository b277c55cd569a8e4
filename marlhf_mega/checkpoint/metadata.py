"""Look into the table of contents of a sharded checkpoint without executing it.

Torch keeps that table, `.metadata`, as a pickle, and reading a pickle calls whatever it names. The
machine below takes the few instructions such a table is made of and builds inert records, so
nothing is imported or called. Only a file that passes may be given to torch.
"""

import math
import pickletools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

FILE = ".metadata"

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
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "SHORT_BINUNICODE",
    "BINUNICODE",
}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class RefusedTableError(Exception):
    """The file is not a plain table of contents; the text completes "it ..."."""


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle refers to; never looked up."""

    name: str


@dataclass(eq=False)
class _Record:
    """What the pickle would have made by calling `name`."""

    name: str
    arguments: tuple[Any, ...]
    state: dict[str, Any] = field(default_factory=dict)


_MARK = object()


@dataclass(frozen=True)
class TensorFacts:
    """What a table says of a tensor as a whole."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the global shape of every tensor in a sharded checkpoint, see `read_tensors`."""
    return {name: facts.shape for name, facts in read_tensors(folder).items()}


def read_tensors(folder: Path) -> dict[str, TensorFacts]:
    """Return the global shape and number format of every tensor in a sharded checkpoint, by name.

    Args:
        folder: holds `.metadata` and the files it lists.

    Raises:
        RuntimeError: the table names anything but the classes of a table, lists objects other than
            tensors, which torch would unpickle, or files outside the folder.
    """
    path = folder / FILE
    try:
        tensors, files = _contents(_interpret(path.read_bytes()))
        for file in files:
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


def _interpret(data: bytes) -> Any:
    """Run the instructions on inert values and return the last one."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return stack.pop()
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif opcode.name in ("BINPUT", "LONG_BINPUT"):
                memo[_expect(int, argument)] = stack[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[_expect(int, argument)])
            elif not _push(opcode.name, argument, stack):
                _combine(opcode.name, stack)
    except (ValueError, IndexError, KeyError, TypeError):
        raise RefusedTableError("is damaged") from None
    raise RefusedTableError("is damaged")


def _push(opcode: str, argument: Any, stack: list[Any]) -> bool:
    """Do the instructions that only add a value; false if it is another one."""
    if opcode in ("PROTO", "FRAME"):
        return True
    if opcode in _LITERALS:
        stack.append(argument)
    elif opcode in _CONSTANTS:
        stack.append(_CONSTANTS[opcode])
    elif opcode in _EMPTY:
        stack.append(_EMPTY[opcode]())
    elif opcode == "MARK":
        stack.append(_MARK)
    else:
        return False
    return True


def _combine(opcode: str, stack: list[Any]) -> None:
    """Do the instructions that take values off the stack."""
    match opcode:
        case "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            size = _TUPLES[opcode]
            stack[-size:] = [tuple(stack[-size:])]
        case "APPEND" | "APPENDS":
            values = [stack.pop()] if opcode == "APPEND" else _pop_to_mark(stack)
            _expect(list, stack[-1]).extend(values)
        case "SETITEM" | "SETITEMS":
            values = stack[-2:] if opcode == "SETITEM" else _pop_to_mark(stack)
            if opcode == "SETITEM":
                del stack[-2:]
            _expect(dict, stack[-1]).update(zip(values[::2], values[1::2], strict=True))
        case "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_allowed(f"{module}.{name}"))
        case "NEWOBJ" | "REDUCE":
            arguments = _expect(tuple, stack.pop())
            stack.append(_Record(_expect(_Name, stack.pop()).name, arguments))
        case "BUILD":
            state = stack.pop()
            # Setting attributes of a class would change it for the whole process.
            record = _expect(_Record, stack[-1])
            record.state = state if isinstance(state, dict) else {"": state}
        case _:
            raise RefusedTableError(f"has the instruction {opcode}")


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    start = len(stack) - 1 - stack[::-1].index(_MARK)
    values = stack[start + 1 :]
    del stack[start:]
    return values


def _expect(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise RefusedTableError("is damaged")
    return value


def _allowed(name: str) -> _Name:
    module, _, last = name.rpartition(".")
    is_dtype = module == "torch" and isinstance(getattr(torch, last, None), torch.dtype)
    if name not in _CLASSES and not is_dtype:
        raise RefusedTableError(f"names {name}")
    return _Name(name)


def _contents(table: Any) -> tuple[dict[str, TensorFacts], set[str]]:
    """Return the tensors' facts and the names of the files that hold them."""
    state = _expect(_Record, table).state
    tensors: dict[str, TensorFacts] = {}
    for key, entry in _expect(dict, state.get("state_dict_metadata")).items():
        facts = _expect(_Record, entry)
        if facts.name != f"{_DCP}.metadata.TensorStorageMetadata":
            raise RefusedTableError(f"lists {key}, which is not a tensor")
        (size,) = _expect(_Record, facts.state.get("size")).arguments
        shape = tuple(_expect(int, n) for n in _expect(tuple, size))
        tensors[_expect(str, key)] = TensorFacts(shape, _dtype(facts.state.get("properties")))
    places = [_expect(_Record, p).state for p in _expect(dict, state.get("storage_data")).values()]
    if any(place.get("transform_descriptors") for place in places):
        raise RefusedTableError("asks for the files to be transformed")
    return tensors, {_expect(str, place.get("relative_path")) for place in places}


def _dtype(properties: Any) -> torch.dtype:
    """Return the number format of a tensor's properties, which torch keeps as a plain tuple."""
    values = _expect(_Record, properties).state.get("")
    name = _expect(_Name, _expect(tuple, values)[0]).name
    return _expect(torch.dtype, getattr(torch, name.removeprefix("torch."), None))
