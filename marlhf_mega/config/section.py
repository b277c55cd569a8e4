"""The base of every section of the configuration."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of keys. Unknown keys are errors, defaults live on the fields only."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def spell_off(value: object) -> object:
    """Take an unquoted `off`, which YAML reads as false, for what was written."""
    return "off" if value is False else value
