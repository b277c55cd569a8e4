"""Read JSONL, gzipped JSONL and Parquet files row by row, and check every row.

A bad row is reported as `file:line: field: reason`; in Parquet files the line is the row number.
"""

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

Row = dict[str, Any]
RowKind = Literal["sft", "preferences", "prompts", "offline"]

_TEXT_FIELDS: dict[RowKind, tuple[str, ...]] = {
    "sft": ("response",),
    "preferences": ("chosen", "rejected"),
    "prompts": (),
    "offline": ("response",),
}
_NUMBER_FIELDS: dict[RowKind, tuple[str, ...]] = {
    "sft": (),
    "preferences": (),
    "prompts": (),
    "offline": ("reward",),
}
_SUFFIXES = ".jsonl, .jsonl.gz or .parquet"


def read_rows(path: str | Path, kind: RowKind) -> list[Row]:
    """Read and check a data file. `prompt` may be text or a chat message list.

    Args:
        path: a .jsonl, .jsonl.gz or .parquet file.
        kind: `sft` needs prompt and response; `preferences` prompt, chosen and rejected, with an
            optional number `margin`; `prompts` prompt; `offline` prompt, response and a number
            `reward`. Further fields are kept.

    Raises:
        ValueError: missing or empty file, unreadable content, or a bad row.
    """
    rows = []
    for line, row in read_objects(path):
        _check_row(row, kind=kind, where=f"{path}:{line}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: must hold at least one row; the file is empty. Add rows.")
    return rows


def read_objects(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield (line number from 1, object) of a data file, skipping blank lines.

    Raises:
        ValueError: missing file, unknown suffix, or a line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: must be a file; not found. Check the path.")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_jsonl(path)
    else:
        raise ValueError(f"{path}: must be a {_SUFFIXES} file; unknown suffix. Convert it.")


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL, UTF-8, one object a line; what JSON cannot hold (dates, say) as text."""
    with Path(path).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def content_hash(path: str | Path) -> str:
    """Return the sha256 of the file's bytes, so that a resumed run notices changed data."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    opener = gzip.open if path.suffix == ".gz" else open
    line_number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for line_number, line in enumerate(file, start=1):
                if line.strip():
                    yield line_number, _parse_object(line, where=f"{path}:{line_number}")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}:{line_number + 1}: must be readable UTF-8 text; {error}. Write the file again."
        ) from error


def _parse_object(line: str, *, where: str) -> Row:
    try:
        row = json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: json: {error.msg} at column {error.colno}. Mend the line."
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: json: must be an object; got {_type_name(row)}. Mend the line.")
    if "\\ud" in line.lower():
        _check_surrogates(row, where=where)
    return row


def _check_surrogates(row: Row, *, where: str) -> None:
    """Refuse an escape of half a character, such as a text that was cut within an emoji has."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise ValueError(
            f"{where}: json: must be Unicode text; {half} is half a character. Mend the line."
        ) from None


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet  # here because it is slow to import and rarely needed

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches())
            rows = (row for batch in batches for row in batch)
            for number, row in enumerate(rows, start=1):
                # A column is there for every row: an absent field reads as null.
                yield number, {name: value for name, value in row.items() if value is not None}
    except pyarrow.ArrowInvalid as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: must be a Parquet file; {reason} Write the file again."
        ) from error


def _check_row(row: Row, *, kind: RowKind, where: str) -> None:
    names = ("prompt", *_TEXT_FIELDS[kind], *_NUMBER_FIELDS[kind])
    for name in names:
        if name not in row:
            found = ", ".join(sorted(row)) or "none"
            raise ValueError(f"{where}: {name}: missing; the row has the fields: {found}. Add it.")
    _check_prompt(row["prompt"], where=where)
    for name in _TEXT_FIELDS[kind]:
        if not isinstance(row[name], str):
            raise ValueError(
                f"{where}: {name}: must be text; got {_type_name(row[name])}. Write text."
            )
    numbers = _NUMBER_FIELDS[kind]
    if kind == "preferences" and "margin" in row:
        numbers = ("margin",)
    for name in numbers:
        value = row[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and math.isfinite(value)):
            raise ValueError(
                f"{where}: {name}: must be a finite number; got {value!r}. Write one, or leave the "
                "row out."
            )


def _check_prompt(prompt: object, *, where: str) -> None:
    if isinstance(prompt, str):
        return
    if not isinstance(prompt, Sequence) or not prompt:
        raise ValueError(
            f"{where}: prompt: must be text or a list of chat messages; got {_type_name(prompt)}."
        )
    for index, message in enumerate(prompt):
        fields = ("role", "content")
        if not isinstance(message, dict) or not all(
            isinstance(message.get(field), str) for field in fields
        ):
            raise ValueError(
                f"{where}: prompt[{index}]: must be an object with texts role and content; "
                f"got {message!r:.80}."
            )


def _type_name(value: object) -> str:
    match value:
        case None:
            return "null"
        case dict():
            return "an object"
        case []:
            return "an empty list"
        case list():
            return "a list"
        case str():
            return "text"
    return f"{value!r:.40}"
