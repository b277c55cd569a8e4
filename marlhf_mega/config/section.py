"""Base class of every section of the configuration."""

from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A frozen group of keys. Unknown keys are errors; defaults are given by the fields only."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read_value(cls, value: object, info: ValidationInfo) -> object:
        """Read `none` as null where a key may be null; refuse booleans as numbers."""
        assert info.field_name is not None
        kinds = set(_kinds(cls.model_fields[info.field_name].annotation))
        if NoneType in kinds and value in ("none", "None"):
            return None
        items = value if isinstance(value, list | tuple) else [value]
        if kinds & {int, float} and any(isinstance(item, bool) for item in items):
            raise PydanticCustomError("kind", "input should be a number, not true or false")
        return value


def spell_off(value: object) -> object:
    """Undo YAML's reading of an unquoted `off` as false."""
    return "off" if value is False else value


def _kinds(annotation: Any) -> Iterator[object]:
    """List the types in an annotation, those of literal values included."""
    inner = get_args(annotation)
    for part in inner:
        yield from _kinds(part)
    if not inner:
        yield annotation if isinstance(annotation, type) else type(annotation)
