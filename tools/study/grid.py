"""The grid of a study: arms x seeds of one job, read from YAML."""

import re
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

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
    """As on the command line; a list in the list, such as an alias, is a part of it. `study:` at
    the start of a value stands for the study's directory, `previous:` for the run directory of
    the arm's job before this one."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _flat(cls, given: Any) -> Any:
        if not isinstance(given, list):
            return given
        return [x for item in given for x in (item if isinstance(item, list) else [item])]


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
    arms: dict[str, tuple[str, ...] | tuple[Step, ...]]
    """Name of an arm -> its overrides of `runs`; or jobs of its own, the last of which counts."""
    drawn: tuple[str, ...] = ()
    """The arms in the figures; none named: all."""
    frontiers: dict[str, tuple[str, ...]] = {}
    """Name -> arms of one method at several weights of the KL, whose ends make a frontier of gold
    reward over KL. The others are compared with the first."""

    def has_own_jobs(self, arm: str) -> bool:
        """Whether an arm is of another job than the baseline, so that steps do not compare."""
        return any(isinstance(item, Step) for item in self.arms[arm])

    def jobs_of(self, arm: str) -> tuple[Step, ...]:
        """Return the jobs of an arm, in their order."""
        if self.has_own_jobs(arm):
            return tuple(item for item in self.arms[arm] if isinstance(item, Step))
        overrides = [item for item in self.arms[arm] if isinstance(item, str)]
        more = {"overrides": (*self.runs.overrides, *overrides)}
        return (self.runs.model_copy(update=more),)

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
        named = {f"frontiers.{name}": arms for name, arms in self.frontiers.items()}
        for key, arms in (named | {"drawn": self.drawn}).items():
            for arm in arms:
                if arm not in self.arms:
                    raise ValueError(
                        f"{key}: {arm} must be an arm; there are {', '.join(self.arms)}. Choose "
                        "among them."
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
