"""Tokenised examples in files that all ranks of a machine map into memory, built by one of them.

The cache of a data file lies in the machine's temporary folder, under a name that is a hash of all
that decides its content. It holds token ids as int32 and the other fields as JSON.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy

from marlhf_mega import durable
from marlhf_mega.config.limits import SMALL_DATA_BYTES
from marlhf_mega.config.sections.data import FieldName
from marlhf_mega.data.datasets import (
    ExampleBuilder,
    LengthReport,
    NothingLeftError,
    OfflineExample,
    PreferencePair,
    Prompt,
    SupervisedExample,
)
from marlhf_mega.data.files import Row, RowKind, Rows, content_hash, iterate_rows, read_rows

logger = logging.getLogger(__name__)

Example = TypeVar("Example")
Build = Callable[[ExampleBuilder, Sequence[Row]], Sequence[Example]]
Fields = Mapping[FieldName, str]

CHUNK_ROWS = 4096
PROGRESS_SECONDS = 30.0
STALE_SECONDS = 600.0
"""A rank waits for another one that builds until it has shown no progress for this long."""
UNUSED_SECONDS = 14 * 24 * 3600.0
"""A cache that no job has opened for this long makes room for new ones."""

_CLASSES = {c.__name__: c for c in (Prompt, SupervisedExample, PreferencePair, OfflineExample)}
_FILES = {"ids": "<i4", "id_ends": "<i8", "fields": "<u1", "field_ends": "<i8"}
"""Their number formats; `ends` say where in the other file a list of ids or an example ends."""
_FACTS = "facts.json"


class _NoCacheError(Exception):
    """There can be no cache; the text says why."""


class _Lazy(Sequence[Example], Generic[Example]):
    """A sequence whose elements are made when they are asked for."""

    @abstractmethod
    def _make(self, number: int) -> Example:
        """Return an element, by its number from 0."""

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Make one element, or a list of them."""
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._make(index % len(self))


class _Joined(_Lazy[Example]):
    """One sequence after the other."""

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _make(self, number: int) -> Example:
        part = bisect_right(self._ends, number)
        return self._parts[part][number - self._ends[part]]  # from the end


def joined(parts: Sequence[Sequence[Example]]) -> Sequence[Example]:
    """Return the examples of several files as one sequence."""
    return parts[0] if len(parts) == 1 else _Joined(parts)


class MappedExamples(_Lazy[Example]):
    """Examples of a cache."""

    def __init__(self, folder: Path) -> None:
        """Map the files.

        Raises:
            OSError: there is no cache.
            ValueError: it is damaged.
        """
        facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        for name in _FILES:
            if content_hash(folder / name) != facts["sha256"][name]:
                raise ValueError(f"{name} is not what was written")
        self.report = LengthReport(**facts["report"])
        self._class: Any = _CLASSES[facts["class"]]
        self._names: list[str] = facts["id_names"]
        self._ids, self._id_ends, self._fields, self._field_ends = (
            numpy.memmap(folder / name, dtype, mode="r") for name, dtype in _FILES.items()
        )

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._field_ends)

    def _make(self, number: int) -> Example:
        fields: dict[str, Any] = json.loads(_part(self._fields, self._field_ends, number).tobytes())
        first = number * len(self._names)
        for place, name in enumerate(self._names, start=first):
            fields[name] = _part(self._ids, self._id_ends, place).tolist()
        example: Example = self._class(**fields)
        return example


def examples_of(
    path: str,
    kind: RowKind,
    build: Build[Example],
    builder: ExampleBuilder,
    *,
    fields: Fields | None = None,
    root: Path | None = None,
) -> Sequence[Example]:
    """Tokenise a data file, or map what a rank of this machine or an earlier job has tokenised.

    Does not communicate: the ranks of a machine take turns by a file lock. A file whose rows JSON
    cannot hold (dates in Parquet), or that has no room in the folder, stays in memory.

    Args:
        path: the data file; data sets of the Hub, which are mapped already, stay in memory.
        kind: of its rows.
        build: turns checked rows into examples, row by row.
        builder: with the limits; its report counts the rows also of a cache.
        fields: see `read_rows`.
        root: folder of all caches; none: one of this user in the machine's temporary folder.

    Raises:
        ValueError: as of `read_rows` and `build`.
    """
    file = Path(path)
    if not file.is_file() or file.stat().st_size < SMALL_DATA_BYTES:
        return build(builder, read_rows(path, kind, fields=fields))
    try:
        root = root or _own_folder()
        folder = root / _key(path, kind, build, builder, fields)
        found: MappedExamples[Example] | None = _open(folder, path)
        if found is None:
            with _turn(folder, path) as lock:
                found = _open(folder, path, is_locked=True)
                if found is None:
                    _make_room(root)
                    with _replacing(folder) as temporary:
                        rows = iterate_rows(path, kind, fields=fields)
                        if not _build(temporary, path, rows, build, builder, lock):
                            return build(builder, read_rows(path, kind, fields=fields))  # raises
                    found = MappedExamples(folder)
    except (OSError, _NoCacheError) as error:
        logger.warning("%s: is tokenised by every rank in its own memory; %s", path, error)
        vars(builder.report).update(vars(LengthReport()))
        return build(builder, read_rows(path, kind, fields=fields))
    vars(builder.report).update(vars(found.report))
    return found


def _open(folder: Path, path: str, *, is_locked: bool = False) -> Any:
    """Return a cache, None if it has to be built; the one that may build removes a damaged one."""
    try:
        found: MappedExamples[Any] = MappedExamples(folder)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if is_locked:
            logger.warning(
                "%s: its token cache %s is damaged and built again; %s", path, folder, error
            )
            shutil.rmtree(folder)
        return None
    os.utime(folder)
    return found


def _key(
    path: str,
    kind: RowKind,
    build: Build[Any],
    builder: ExampleBuilder,
    fields: Fields | None = None,
) -> str:
    """Hash the data, the settings, the tokenizer and the code that makes the tokens."""
    code = [content_hash(file) for file in sorted(Path(__file__).parent.glob("*.py"))]
    facts = [
        *(content_hash(path), kind, build.__qualname__, builder.tokenizer.prompt_fingerprint()),
        *(builder.max_prompt_tokens, builder.max_response_tokens, builder.tokenizer.num_known),
        *(builder.long_prompts, builder.control_tokens, builder.turns, {**(fields or {})}, code),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _own_folder() -> Path:
    """Return this user's folder of caches; raises OSError if it is another user's."""
    folder = Path(tempfile.gettempdir()) / f"marlhf-tokens-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _make_room(root: Path) -> None:
    for path in root.iterdir():
        if path.stat().st_mtime < time.time() - UNUSED_SECONDS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _turn(folder: Path, path: str) -> Iterator[Path]:
    """Wait for the lock on a cache, which the kernel takes from a process that ends; yield it."""
    lock = folder.with_suffix(".lock")
    touched, since, waited = 0.0, time.monotonic(), False
    with lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waited:
                    logger.info("%s: another rank of this machine tokenises it", path)
                waited = True
            if touched != lock.stat().st_mtime:
                touched, since = lock.stat().st_mtime, time.monotonic()
            elif time.monotonic() > since + STALE_SECONDS:
                raise _NoCacheError(
                    f"the rank that tokenises it has made no progress for {STALE_SECONDS:g} s"
                )
            time.sleep(0.1)
        yield lock


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that gets its name once it is complete."""
    temporary = folder.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        durable.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _build(
    folder: Path,
    path: str,
    rows: Iterator[tuple[int, Row]],
    build: Build[Example],
    builder: ExampleBuilder,
    lock: Path,
) -> bool:
    """Tokenise a few thousand rows at a time into the files of a cache, unless none is left."""
    writer = _Writer(folder)
    num_rows, shown = 0, time.monotonic()
    while chunk := list(islice(rows, CHUNK_ROWS)):
        with suppress(NothingLeftError):
            writer.add(build(builder, Rows([row for _, row in chunk], [line for line, _ in chunk])))
        num_rows += len(chunk)
        os.utime(lock)
        if time.monotonic() > shown + PROGRESS_SECONDS:
            logger.info("%s: %d rows tokenised", path, num_rows)
            shown = time.monotonic()
    if not writer.is_empty:
        writer.finish(builder.report)
    return not writer.is_empty


class _Writer:
    """Writes examples of one class."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._class = ""
        self._names: list[str] = []
        self._ends = {"ids": 0, "fields": 0}

    @property
    def is_empty(self) -> bool:
        return not self._class

    def add(self, examples: Sequence[Any]) -> None:
        """Append examples to the files."""
        fields = [vars(example) for example in examples]
        self._class = type(examples[0]).__name__
        self._names = [name for name in fields[0] if name.endswith("_ids")]
        lists = [one[name] for one in fields for name in self._names]
        texts = [_exact_json({n: one[n] for n in one.keys() - {*self._names}}) for one in fields]
        self._append("ids", b"".join(numpy.array(ids, "<i4").tobytes() for ids in lists))
        self._append("fields", b"".join(texts))
        self._append_ends("ids", [len(ids) for ids in lists])
        self._append_ends("fields", [len(text) for text in texts])

    def finish(self, report: LengthReport) -> None:
        """Add what a reader needs to know."""
        facts = {
            "class": self._class,
            "id_names": self._names,
            "report": vars(report),
            "sha256": {name: content_hash(self._folder / name) for name in _FILES},
        }
        durable.write(self._folder / _FACTS, json.dumps(facts))

    def _append(self, name: str, data: bytes) -> None:
        with (self._folder / name).open("ab") as file:
            file.write(data)

    def _append_ends(self, name: str, sizes: list[int]) -> None:
        ends = self._ends[name] + numpy.cumsum(sizes, dtype="<i8")
        self._ends[name] = int(ends[-1])
        self._append(f"{name[:-1]}_ends", ends.tobytes())


def _exact_json(fields: dict[str, Any]) -> bytes:
    """Return JSON that gives the same values back, which it does not of dates or tuples."""
    try:
        text = json.dumps(fields)
    except TypeError as error:
        raise _NoCacheError(f"a field cannot be kept: {error}") from error
    if json.loads(text) != fields:
        raise _NoCacheError("a field cannot be kept: JSON gives another value back")
    return text.encode()


def _part(values: numpy.ndarray, ends: numpy.ndarray, number: int) -> numpy.ndarray:
    return values[ends[number - 1] if number else 0 : ends[number]]
