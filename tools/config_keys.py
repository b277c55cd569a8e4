"""Writes configs/KEYS.md, the reference of all configuration keys, from the schema.

python tools/config_keys.py
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.data import DataSource
from marlhf_mega.config.sections.reward import DenseTerm, RewardConstraint, RewardTerm

TARGET = Path(__file__).parents[1] / "configs" / "KEYS.md"
ABOUT = """# Configuration keys

Written by `tools/config_keys.py` from [sections/](../marlhf_mega/config/sections/) and
[model.py](../marlhf_mega/config/model.py), whose texts these are. `null` unsets a key that may be
null.
"""
ITEMS: dict[str, type[BaseModel]] = {
    "data.train_path": DataSource,
    "reward.source": RewardTerm,
    "reward.constraints": RewardConstraint,
    "reward.dense": DenseTerm,
}
"""Keys whose lists hold groups of keys."""
WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}
SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def reference() -> str:
    """Return the page."""
    return ABOUT + "".join(
        _section(name, section.__class__)
        for name, section in Config()
        if isinstance(section, BaseModel)
    )


def _section(name: str, section: type[BaseModel]) -> str:
    rows = "".join(_rows(name, section))
    head = "| key | values | default | meaning |\n|---|---|---|---|\n"
    return f"\n## {name}\n\n{_one_line(section.__doc__)}\n\n{head}{rows}"


def _rows(prefix: str, section: type[BaseModel]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        key, default = f"{prefix}.{name}", field.default
        if isinstance(default, BaseModel):
            yield from _rows(key, default.__class__)
            continue
        cells = (f"`{key}`", _values(field), _default(field), _one_line(field.description))
        yield f"| {' | '.join(cells)} |\n"
        if key in ITEMS:
            yield from _rows(f"{key}.N", ITEMS[key])


def _values(field: FieldInfo) -> str:
    """Return the words that a key takes, or the kind and the range of its values."""
    if get_origin(field.annotation) in (tuple, dict):
        return "list" if get_origin(field.annotation) is tuple else "mapping"
    options = set(_options(field.annotation))
    words = [f"`{option}`" for option in _choices(field.annotation)]
    if any(get_origin(option) is tuple for option in get_args(field.annotation)):
        words.append("list")
    words += [word for kind, word in WORDS.items() if kind in options]
    bounds = [
        f"{sign} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, sign in SIGNS.items()
        if getattr(bound, name, None) is not None
    ]
    null = [" or null"] if NoneType in options else []
    return " ".join([", ".join(words), *bounds]) + "".join(null)


def _options(annotation: Any) -> Iterator[Any]:
    """Yield the types that a value may have."""
    if get_origin(annotation) in (tuple, dict, Literal):
        return
    inner = get_args(annotation)
    for part in inner:
        yield from _options(part)
    if not inner:
        yield annotation


def _choices(annotation: Any) -> Iterator[Any]:
    """Yield the values of the literals in an annotation."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from _choices(part)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return f"`{value if isinstance(value, str | Path) else json.dumps(value)}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description="Write configs/KEYS.md from the schema.").parse_args()
    TARGET.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
