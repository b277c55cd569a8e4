"""Everything a job reads before ranks meet: tokenizer, data, origins. User mistakes end here."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from marlhf_mega import platform
from marlhf_mega.config.checks import (
    GENERATING,
    WITHOUT_TRAINING,
    Job,
    check_job,
    check_world,
    rollout_ranks,
)
from marlhf_mega.config.hf_write import hf_config_from_model
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.origin import Origin, find_origin
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import ExampleBuilder
from marlhf_mega.data.files import Row, RowKind, content_hash, read_rows
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.experience.segmentation import load_parser
from marlhf_mega.metrics.writers import check_wandb
from marlhf_mega.rewards.rule import check_importable
from marlhf_mega.train.resume import check_resume

logger = logging.getLogger(__name__)

Example = TypeVar("Example")
Build = Callable[[ExampleBuilder, Sequence[Row]], Sequence[Example]]


@dataclass(frozen=True, kw_only=True)
class Inputs(Generic[Example]):
    """What a job trains and is judged on."""

    config: Config
    """With the vocabulary size filled in."""
    tokenizer: Tokenizer
    tokenizer_path: Path
    train: Sequence[Example]
    """Empty for jobs that do not train."""
    validation: Sequence[Any]
    """Empty where no file is given."""
    data_hash: str
    """sha256 of the training file."""


def read_inputs(
    config: Config,
    job: Job,
    *,
    world_size: int,
    kind: RowKind,
    build: Build[Example],
    validation: tuple[RowKind, Build[Any]] | None = None,
) -> Inputs[Example]:
    """Check the configuration and read all files. Does not communicate.

    Args:
        config: as loaded.
        job: which command runs.
        world_size: number of ranks.
        kind: rows of the data files.
        build: turns checked rows into examples.
        validation: both for the validation file, where they differ.

    Raises:
        ValueError: anything that the user has to mend.
    """
    data_size = check_world(config, world_size, apart=rollout_ranks(config, job))
    check_job(config, job, data_size)
    check_machine(config, job)
    tokenizer_path = _tokenizer_path(config)
    tokenizer = Tokenizer.load(tokenizer_path)
    config = _with_vocabulary(config, tokenizer)
    assert config.model.vocab_size is not None
    tokenizer.extend(config.model.vocab_size)

    def examples(path: Path | None, kind: RowKind, build: Build[Any]) -> Sequence[Any]:
        if path is None:
            return []
        builder = ExampleBuilder(
            tokenizer=tokenizer,
            max_prompt_tokens=config.data.max_prompt_tokens,
            max_response_tokens=config.data.max_response_tokens,
            long_prompts=config.data.long_prompts,
            source=str(path),
        )
        found = build(builder, read_rows(path, kind))
        if builder.report.has_changes:
            logger.info("%s: %s", path, builder.report)
        return found

    train_path = None if job in WITHOUT_TRAINING else config.data.train_path
    data_hash = content_hash(train_path) if train_path else ""
    if job not in WITHOUT_TRAINING:
        _check_export(config)
        check_resume(config, job, data_hash, tokenizer.fingerprint())
    return Inputs(
        config=config,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        train=examples(train_path, kind, build),
        validation=examples(config.data.validation_path, *(validation or (kind, build))),
        data_hash=data_hash,
    )


def check_machine(config: Config, job: Job) -> None:
    """Check that this machine has the device and the code that the job will use.

    Raises:
        ValueError: with the key that asks for what is not here.
    """
    check_wandb(config.logging.wandb)
    _check_device(config)
    if job not in GENERATING:
        return
    for term in config.reward.source:
        if term.is_rule:
            check_importable(term.source, sandbox=term.sandbox)
    if config.evaluate.gold is not None and job != "generate":
        check_importable(config.evaluate.gold, key="evaluate.gold")
    if config.macro.rule == "parsing" and job == "ppo":
        load_parser(config.macro.parser)


def check_same_tokenizer(origin: Origin, tokenizer: Tokenizer, *, key: str) -> None:
    """Refuse a model that was trained with another vocabulary.

    Raises:
        ValueError: the vocabularies differ.
    """
    theirs, ours = origin.tokenizer_fingerprint, tokenizer.fingerprint()
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"{key}={origin.path}: must have been trained with the tokenizer of this run "
            f"({ours[:12]}); its own is {theirs[:12]}. Use the same tokenizer.path."
        )
    size = origin.model.vocab_size
    if size is not None and size < tokenizer.vocab_size:
        raise ValueError(
            f"{key}={origin.path}: its vocabulary of {size} must hold the tokenizer's "
            f"{tokenizer.vocab_size} tokens. Use the tokenizer that belongs to the model."
        )


def origin_of(path: str, tokenizer: Tokenizer, *, key: str) -> Origin:
    """Find a model on disk and check that it speaks the run's vocabulary.

    Raises:
        ValueError: it is missing or does not fit.
    """
    origin = find_origin(Path(path), key=key)
    check_same_tokenizer(origin, tokenizer, key=key)
    return origin


def _check_device(config: Config) -> None:
    if config.rollout.cuda_graphs and platform.current().name != "cuda":
        raise ConfigError(
            "rollout.cuda_graphs=true: needs a CUDA device; there is none. Set it to false."
        )
    if config.precision.fp8 == "off":
        return
    support = platform.current().supports_fp8(config.precision.fp8_recipe)
    if not support:
        raise ConfigError(
            f"precision.fp8={config.precision.fp8}: cannot be used here; {support.reason}. "
            "Set it to off, or choose another precision.fp8_recipe."
        )


def _check_export(config: Config) -> None:
    """Refuse before training a model that could not be written after it."""
    model = config.model
    has_source = model.hf_path is not None and model.hf_path.is_dir()
    if has_source or not config.checkpoint.export_hf:
        return
    try:
        hf_config_from_model(model)
    except ValueError as error:
        raise ConfigError(
            f"{error}\ncheckpoint.export_hf=true: writes such a folder at the end of the run. Set "
            "it to false if none is needed."
        ) from None


def _tokenizer_path(config: Config) -> Path:
    if config.tokenizer.path is not None:
        return config.tokenizer.path
    model = config.model
    if model.hf_path is not None:
        return model.hf_path
    if model.init not in ("auto", "random"):
        run = Path(model.init)
        return run / "tokenizer" if (run / "config.yaml").is_file() else run
    raise ConfigError(
        "tokenizer.path: must be set unless the model comes with one; it is not set. Give a "
        "sentencepiece .model file or a tokenizer folder."
    )


def _with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    model, size = config.model, tokenizer.vocab_size
    if model.vocab_size is None:
        return config.model_copy(update={"model": model.model_copy(update={"vocab_size": size})})
    if model.vocab_size < size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}: must hold the tokenizer's {size} tokens. "
            "Raise it, or use the tokenizer that belongs to the model."
        )
    if model.init not in ("auto", "random"):
        origin = find_origin(Path(model.init), key="model.init")
        check_same_tokenizer(origin, tokenizer, key="model.init")
    return config
