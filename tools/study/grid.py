"""The grid of a study: arms x seeds of one job, read from YAML."""

import re
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from marlhf_mega.config.load import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Step(BaseModel):
    """A job that all arms share, such as the reward model's training."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job: str
    """`sft`, `reward`, `quickstart`, ..."""
    config: Path | None = None
    """Configuration file; a path inside the study's directory starts with `study:`."""
    overrides: tuple[str, ...] = ()
    """As on the command line. `study:` at the start of a value stands for the study's directory."""


class Grid(BaseModel):
    """What a study compares."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prepare: dict[str, Step] = {}
    """Directory in the study -> the job that fills it, in this order, once."""
    runs: Step
    """The job of all arms."""
    seeds: tuple[int, ...]
    """`run.seed` of each run of an arm. Runs of one seed are compared with each other."""
    baseline: str
    """The arm that the others are compared with."""
    arms: dict[str, tuple[str, ...]]
    """Name of an arm -> its overrides."""

    @model_validator(mode="after")
    def _names_are_usable(self) -> Self:
        for name in (*self.prepare, *self.arms):
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r}: must be letters, digits, '.', '-' or '_', since directories are "
                    "named so. Rename it."
                )
        if self.baseline not in self.arms:
            raise ValueError(
                f"baseline={self.baseline}: must be an arm; there are {', '.join(self.arms)}. "
                "Choose one of them."
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(
                f"seeds={list(self.seeds)}: must be different numbers, one at least. Change them."
            )
        return self


def load_grid(path: Path) -> Grid:
    """Read a grid.

    Raises:
        ConfigError: it cannot be read, or a key is wrong.
    """
    try:
        tree: Any = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
        return Grid.model_validate(tree)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}. Give a YAML file.") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{path}: {key}: {message}" if key else f"{path}: {message}") from None
