"""Append-only JSON Lines files that survive kills and resumes."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from marlhf_mega import durable


class JsonLines:
    """A `.jsonl` file of objects with a `step`, complete after every write."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Open for appending; drop what an earlier attempt wrote from `first_step` on."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_before(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object; NaN and infinity, which JSON cannot hold, become null."""
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def add(self, step: int, more: Mapping[str, float]) -> None:
        """Add numbers to those of a step that is written."""
        self.close()
        records = list(read_lines(self.path))
        for record in records:
            if record["step"] == step:
                record |= {name: record.get(name, 0.0) + value for name, value in more.items()}
        _rewrite(self.path, records)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file, if it exists. A last line cut short by a kill is skipped.

    Raises:
        ValueError: a line is not JSON, or not an object with an integer `step`.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number}: must be JSON; {error.msg}. Remove the line."
                ) from None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(
                    f"{path}:{number}: must be an object with an integer step; it is not. "
                    "Remove the line."
                )
            yield record


def _keep_before(path: Path, first_step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_lines(path) if record["step"] < first_step]
    _rewrite(path, kept)


def _rewrite(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    durable.replace(path, "".join(json.dumps(record) + "\n" for record in records))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
