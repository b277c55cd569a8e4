"""Tokenizer and data."""

import glob
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from marlhf_mega.config.section import Section

LongPrompts = Literal["error", "drop", "truncate"]


ControlTokens = Literal["text", "parse"]


class TokenizerConfig(Section):
    """Conversion of text to token ids."""

    path: Path | None = None
    """A SentencePiece .model file or a Hugging Face tokenizer folder. None means
    `model.hf_path`."""


class DataSource(Section):
    """Where examples come from, and how often an epoch visits them."""

    path: str = Field(min_length=1)
    """A file (.jsonl, .jsonl.gz, .parquet), a pattern of files (`shards/*.jsonl`), or a data set of
    the Hugging Face Hub or of a folder: `hf://NAME:SPLIT`, `hf://NAME/SUBSET:SPLIT`."""
    weight: float = Field(1.0, gt=0)
    """Visits of each example in one epoch. 0.3 takes the next 30 % of a shuffled order in every
    epoch; 2 takes all of them twice."""

    @property
    def is_hub(self) -> bool:
        """Whether the library `datasets` reads it."""
        return self.path.startswith("hf://")

    def files(self) -> list[str]:
        """Return what the path names, a pattern's files in the order of their names."""
        if self.is_hub or Path(self.path).is_file():
            return [self.path]
        # Path.glob takes no absolute pattern.
        return sorted(glob.glob(self.path, recursive=True)) or [self.path]  # noqa: PTH207


def _sources(value: object) -> object:
    """Read a path, or a list of paths and of `{path, weight}`."""
    if isinstance(value, str | Path):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    if not value:
        return None
    return [{"path": str(item)} if isinstance(item, str | Path) else item for item in value]


Sources = Annotated[tuple[DataSource, ...] | None, BeforeValidator(_sources)]


def show_sources(sources: tuple[DataSource, ...] | None) -> str:
    """Return the paths for a message: one alone, several as a list."""
    paths = [source.path for source in sources or ()]
    return paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"


FieldName = Literal[
    "prompt",
    "response",
    "messages",
    "chosen",
    "rejected",
    "margin",
    "chosen_probability",
    "reward",
    "chosen_reward",
    "rejected_reward",
    "finished",
    "chosen_safe",
    "rejected_safe",
    "from_reference",
    "responses",
    "rewards",
    "user",
]


class DataConfig(Section):
    """Training and validation data."""

    train_path: Sources = None
    """Training examples, with the fields that the job needs: a path, or a list of paths and of
    `{path, weight}`. An epoch of several visits each example as often as its weight says, in one
    shuffled order."""
    validation_path: Sources = None
    """Held-out examples with the same fields, all of them once."""
    fields: dict[FieldName, str] = Field({})
    """Fields of the rows under other names: `{prompt: question, response: answer}`. A pair may have
    a `margin`, which the lead of the chosen response is to exceed (the difference of two ratings;
    also negative), and `chosen_probability`, a soft label from 0 to 1."""
    max_prompt_tokens: int = Field(512, gt=0)
    """Longest prompt, in tokens."""
    max_response_tokens: int = Field(512, gt=0)
    """Longest response of the examples of sft, reward, preference and offline, in tokens. Longer
    ones are truncated and counted."""
    long_prompts: LongPrompts = "error"
    """What happens to longer prompts: the run does not start, they are dropped, or they lose their
    beginning. The last two are counted."""
    control_tokens: ControlTokens = "text"
    """What a control token (`<|im_end|>`) that is spelled out in a chat message or inside a
    response becomes: ordinary text, or the token itself (`parse`). Text prompts, which may come
    from a template, and an end token at the very end of a response are always parsed."""
    shuffle: bool = True
    """Draw the examples in a new order every epoch. Otherwise in file order."""
