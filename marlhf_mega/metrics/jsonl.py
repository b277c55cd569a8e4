"""Append-only JSON Lines files that survive kills and resumes."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """A `.jsonl` file of objects with a `step`, complete after every write."""

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Open for appending; what an earlier attempt wrote from `first_step` on is dropped."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_before(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object; NaN and infinity, which JSON cannot hold, become null."""
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file; a last line cut off by a kill is left out, no file is empty."""
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
    rewritten = path.with_suffix(".partial")
    with rewritten.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    rewritten.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
