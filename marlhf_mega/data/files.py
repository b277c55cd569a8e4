"""Reads JSONL, gzipped JSONL and Parquet files row by row and checks every row.

A bad row is reported as `file:line: field: reason`; in Parquet files and data sets of the Hub the
line is the row number.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from marlhf_mega.config.sections.data import DataSource, FieldName
from marlhf_mega.data.hub import hub_hash, read_hub
from marlhf_mega.data.messages import (
    check_conversation,
    check_messages,
    type_name,
    with_text_answers,
)

Row = dict[str, Any]
RowKind = Literal["sft", "preferences", "prompts", "offline", "offline_pairs", "ranked"]

_TEXT_FIELDS: dict[RowKind, tuple[FieldName, ...]] = {
    "sft": ("response",),
    "preferences": ("chosen", "rejected"),
    "prompts": (),
    "offline": ("response",),
    "offline_pairs": ("chosen", "rejected"),
    "ranked": (),
}
_OF_PAIRS: tuple[FieldName, ...] = ("margin", "chosen_probability")
"""Numbers that a pair may have."""
_REWARDS: dict[RowKind, tuple[FieldName, ...]] = {
    "offline": ("reward",),
    "offline_pairs": ("chosen_reward", "rejected_reward"),
}
"""Numbers that may be null."""
SAFE: tuple[FieldName, FieldName] = ("chosen_safe", "rejected_safe")
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127
_SUFFIXES = ".jsonl, .jsonl.gz or .parquet"


class Rows(list[Row]):
    """Checked rows, and the line of each in its file."""

    def __init__(self, rows: Iterable[Row], lines: Iterable[int]) -> None:
        super().__init__(rows)
        self.lines = list(lines)


def read_rows(
    path: str | Path, kind: RowKind, *, fields: Mapping[FieldName, str] | None = None
) -> Rows:
    """Read and check a data file. `prompt` may be text or a chat message list.

    Args:
        path: a .jsonl, .jsonl.gz or .parquet file, or `hf://NAME:SPLIT`.
        kind: `sft` rows need prompt and response, or messages; `preferences` prompt, chosen and
            rejected, texts or message lists, with optional numbers `margin` and
            `chosen_probability`; `prompts` prompt; `offline` prompt, response and a number
            `reward`, null where there is no score; `offline_pairs` prompt, chosen and rejected with
            `chosen_reward` and `rejected_reward`. Further fields are kept.
        fields: fields that have another name in the file.

    Raises:
        ValueError: the file is missing, empty or not readable, or a row is bad.
    """
    rows = Rows([], [])
    for line, row in iterate_rows(path, kind, fields=fields):
        rows.append(row)
        rows.lines.append(line)
    return rows


def iterate_rows(
    path: str | Path, kind: RowKind, *, fields: Mapping[FieldName, str] | None = None
) -> Iterator[tuple[int, Row]]:
    """Yield line numbers and checked rows one at a time, see `read_rows`."""
    fields, is_empty = fields or {}, True
    for line, row in read_objects(path):
        where = f"{path}:{line}"
        row = row | {ours: row[theirs] for ours, theirs in fields.items() if theirs in row}
        if "chosen" in _TEXT_FIELDS[kind]:
            row = with_text_answers(row, where=where)
        _check_row(row, kind=kind, where=where, fields=fields)
        is_empty = False
        yield line, row
    if is_empty:
        raise ValueError(f"{path}: must hold at least one row; the file is empty. Add rows.")


def is_conversation(row: Row) -> bool:
    """Whether an sft row is a whole chat, the assistant's answers included."""
    return "messages" in row and "response" not in row


def read_objects(path: str | Path) -> Iterator[tuple[int, Row]]:
    """Yield (line number, from 1, and object) of a data file, skipping blank lines.

    Raises:
        ValueError: the file is missing, its suffix is unknown, or a line is not a JSON object.
    """
    if str(path).startswith("hf://"):
        yield from enumerate(map(_of_table, read_hub(str(path))), start=1)
        return
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
    """Write rows as JSONL in UTF-8; values that JSON lacks, such as dates, become text."""
    with Path(path).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def content_hash(path: str | Path) -> str:
    """Return the sha256 of a file, or of the rows of a data set of the Hub."""
    if str(path).startswith("hf://"):
        return hub_hash(str(path))
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_hash(sources: Sequence[DataSource]) -> str:
    """Return the sha256 by which a resumed run notices changed data.

    That of one file is the file's own; that of several covers their order and weights.
    """
    found = [(content_hash(file), source.weight) for source in sources for file in source.files()]
    if [weight for _, weight in found] == [1.0]:
        return found[0][0]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


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
            f"{where}: json: {error.msg} at column {error.colno}. Fix the line."
        ) from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
        reason = str(error).partition(";")[0]
        raise ValueError(f"{where}: json: must be readable; {reason}. Fix the line.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: json: must be an object; got {type_name(row)}. Fix the line.")
    if "\\ud" in line.lower():
        _check_surrogates(row, where=where)
    return row


def _check_surrogates(row: Row, *, where: str) -> None:
    """Refuse a lone surrogate, as in a text that was cut inside an emoji."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise ValueError(
            f"{where}: json: must be Unicode text; {half} is half a character. Fix the line."
        ) from None


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet  # slow to import and rarely needed

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = pyarrow.schema([f.with_type(_readable(f.type)) for f in file.schema_arrow])
            for batch in file.iter_batches():
                if schema != file.schema_arrow:
                    batch = pyarrow.Table.from_batches([batch]).cast(schema)
                for row in _rows_of_batch(batch, path, number):
                    number += 1
                    yield number, _of_table(row)
    except (pyarrow.ArrowException, OSError) as error:
        where = f"{path}:{number + 1}" if number else f"{path}"
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{where}: must be a Parquet file; {reason}. Write the file again."
        ) from error


def _readable(kind: Any) -> Any:
    """Return an Arrow type without nanoseconds, which Python has not: text, or their number."""
    import pyarrow
    from pyarrow import types

    is_time = types.is_timestamp(kind) or types.is_time64(kind)
    if is_time and kind.unit == "ns":
        return pyarrow.string()
    if types.is_duration(kind) and kind.unit == "ns":
        return pyarrow.int64()
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_readable(field.type)) for field in kind])
    if types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_readable(kind.value_type)))
    if types.is_map(kind):
        return pyarrow.map_(kind.key_type, _readable(kind.item_type))
    return kind


def _rows_of_batch(batch: Any, path: Path, num_before: int) -> list[Row]:
    try:
        rows: list[Row] = batch.to_pylist()
    except Exception as error:  # whatever a value does not become in Python
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            for number, value in enumerate(column, start=num_before + 1):
                _convert(value, where=f"{path}:{number}: {name}")
        raise ValueError(f"{path}:{num_before + 1}: must be readable; {error}.") from error
    return rows


def _convert(value: Any, *, where: str) -> None:
    try:
        value.as_py()
    except Exception as error:  # as above
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{where}: must be a value that Python holds; {value.type}: {reason}. Convert the "
            "column, or remove it."
        ) from error


def _of_table(row: Row) -> Row:
    # Whether a reward is null is part of the row, not of the format.
    names = (name for kind in _REWARDS.values() for name in kind)
    rewards = {name: None for name in names if row.get(name, 0) is None}
    kept: Row = _without_nulls(row)
    return kept | rewards


def _without_nulls(value: Any) -> Any:
    """Remove null fields: every object of a column has the fields of all, absent ones as null."""
    match value:
        case dict():
            return {name: _without_nulls(v) for name, v in value.items() if v is not None}
        case list():
            return [_without_nulls(v) for v in value]
    return value


def _check_row(row: Row, *, kind: RowKind, where: str, fields: Mapping[FieldName, str]) -> None:
    if kind == "sft" and is_conversation(row):
        check_conversation(row["messages"], where=where)
        return
    numbers: list[FieldName] = [*_REWARDS.get(kind, ())]
    lists: list[FieldName] = ["responses", "rewards"] if kind == "ranked" else []
    _check_fields(row, ["prompt", *_TEXT_FIELDS[kind], *numbers, *lists], where, fields)
    if not isinstance(row["prompt"], str):
        check_messages(row["prompt"], name="prompt", where=where)
    for name in _TEXT_FIELDS[kind]:
        if not isinstance(row[name], str):
            raise ValueError(
                f"{where}: {name}: must be text; got {type_name(row[name])}. Write text."
            )
    if kind == "ranked":
        _check_ranking(row, where=where)
    if kind == "preferences":
        numbers = [name for name in _OF_PAIRS if row.get(name) is not None]
        _check_labels(row, where=where)
    for name in numbers:
        if row[name] is not None or kind not in _REWARDS:
            _check_number(row[name], name, where=where)
    if kind in ("sft", "offline") and not isinstance(row.get("finished"), bool | None):
        raise ValueError(
            f"{where}: finished: must be true or false; got {type_name(row['finished'])}. Fix it."
        )


def _check_fields(
    row: Row, names: Sequence[FieldName], where: str, fields: Mapping[FieldName, str]
) -> None:
    for name in names:
        if name not in row:
            found = ", ".join(sorted(row)) or "none"
            advice = f"Add it, or say which field it is: data.fields.{name}=FIELD"
            if name in fields:
                advice = f"Correct data.fields.{name}={fields[name]}"
            raise ValueError(
                f"{where}: {name}: missing; the row has the fields: {found}. {advice}."
            )


def _check_number(value: Any, name: FieldName, *, where: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Training computes in float32. The comparison is exact, and false for NaN.
    if not (is_number and abs(value) <= _FLOAT32_MAX):
        raise ValueError(
            f"{where}: {name}: must be a finite number; got {value!r:.40}. Write one "
            f"of at most {_FLOAT32_MAX:.3g}, or remove the row."
        )
    if name == "chosen_probability" and not 0 <= value <= 1:
        raise ValueError(
            f"{where}: {name}: must be a probability from 0 to 1; got {value!r:.40}. Fix it."
        )


def _check_ranking(row: Row, *, where: str) -> None:
    texts, rewards = row["responses"], row["rewards"]
    is_list = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not is_list or len(texts) < 2:
        raise ValueError(
            f"{where}: responses: must be a list of two texts or more; got {texts!r:.40}. Fix it."
        )
    if not isinstance(rewards, list) or len(rewards) != len(texts):
        raise ValueError(
            f"{where}: rewards: must be a list of {len(texts)} numbers, one for each response; got "
            f"{rewards!r:.40}. Fix it."
        )
    for reward in rewards:
        _check_number(reward, "rewards", where=where)


def _check_labels(row: Row, *, where: str) -> None:
    """Check what some preference losses read of a pair."""
    for name in (name for name in SAFE if name in row):
        if not isinstance(row[name], bool):
            raise ValueError(
                f"{where}: {name}: must be true or false; got {type_name(row[name])}. Fix it."
            )
    if row.get("from_reference", "chosen") not in ("chosen", "rejected"):
        raise ValueError(
            f"{where}: from_reference: must be chosen or rejected, the response that the reference "
            f"gave; got {row['from_reference']!r:.40}. Fix it."
        )
    user = row.get("user", "")
    if not isinstance(user, str | int) or isinstance(user, bool):
        raise ValueError(
            f"{where}: user: must be text or an integer, whose preference the pair is; got "
            f"{type_name(user)}. Fix it."
        )
