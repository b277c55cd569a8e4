"""Go on from the newest checkpoint of the run directory, if it is of the same run."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from marlhf_mega.checkpoint.contents import newest_state
from marlhf_mega.checkpoint.folders import latest_of
from marlhf_mega.config.checks import Job, read_sections
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.origin import run_fingerprint
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.data import show_sources
from marlhf_mega.lifeline import is_restart, seconds_since_launch

logger = logging.getLogger(__name__)

CONFIG = "config"
"""Key of the state that holds the settings of the run."""

_SHARED = ("model", "precision", "tokenizer", "data")
# The data file may move, since its hash is compared; the rest says how, not what, is computed.
_FREE = {
    "data.train_path",
    "data.validation_path",
    "preference.reference_dir",
    "rollout.slots",
    "rollout.ranks",
    "rollout.tensor_size",
    "rollout.pipeline_size",
}
_FREE_NAMES = {
    "microbatch_size",
    "microbatch_tokens",
    "scoring_microbatch_factor",
    "packing",
}


def settings_of(config: Config) -> dict[str, Any]:
    """Return the configuration as JSON values, to be saved with the state."""
    return config.model_dump(mode="json")


def starts_afresh(config: Config, written: Path | None = None) -> bool:
    """Whether to leave alone what is there: `checkpoint.resume=never`, if it is from before.

    A restart by torchrun resumes from what its own launch has written.

    Args:
        config: of this run.
        written: file that changes with every save; None means that of training jobs.
    """
    if config.checkpoint.resume != "never":
        return False
    if not is_restart():
        return True
    try:
        changed = (written or latest_of(config.run.dir)).stat().st_mtime
    except OSError:
        return True
    return changed < time.time() - seconds_since_launch()


def is_due(done: int, interval: int, num_steps: int) -> bool:
    """Whether what happens every `interval` steps and at the end happens after `done` steps."""
    return done == num_steps or (interval > 0 and done % interval == 0)


def check_resume(
    config: Config, job: Job, data_hash: str, fingerprint: str, prompt_fingerprint: str
) -> None:
    """Refuse before anything starts what `resume` would refuse. Does not communicate.

    Args:
        config: of this run, with the vocabulary size.
        job: whose settings must be those of the checkpoint.
        data_hash: sha256 of the training file.
        fingerprint: of the tokenizer's vocabulary.
        prompt_fingerprint: of what else decides which ids a row becomes.

    Raises:
        ConfigError: as of `resume`, or the training file or the vocabulary is another.
    """
    if starts_afresh(config):
        return
    state = newest_state(config.run.dir)
    if state is None:
        check_fresh_start(config)
        return
    check_settings(state.get(CONFIG, {}), config, job)
    saved_hash = state.get("stream", {}).get("data_hash", data_hash)
    if saved_hash != data_hash:
        path = show_sources(config.data.train_path)
        raise ConfigError(
            f"data.train_path={path}: must hold the rows of the checkpoint, "
            f"sha256 {saved_hash}; it is {data_hash}. Use the same file or another run.dir."
        )
    saved_fingerprint = run_fingerprint(config.run.dir) or fingerprint
    if saved_fingerprint != fingerprint:
        raise ConfigError(
            f"tokenizer.path={config.tokenizer.path}: must hold the vocabulary of the checkpoint "
            f"({saved_fingerprint[:12]}); it is {fingerprint[:12]}. The run keeps a copy in "
            f"{config.run.dir / 'tokenizer'}: use that, or another run.dir."
        )
    saved = run_fingerprint(config.run.dir, "prompt_fingerprint") or prompt_fingerprint
    if saved != prompt_fingerprint:
        raise ConfigError(
            f"tokenizer.path={config.tokenizer.path}: must turn rows into tokens as that of the "
            f"checkpoint did ({saved[:12]}); its chat template, its begin-of-sequence token or its "
            f"end tokens are others ({prompt_fingerprint[:12]}). The run keeps a copy in "
            f"{config.run.dir / 'tokenizer'}: use that, or another run.dir."
        )


def check_same_held_out(config: Config, data_hash: str) -> None:
    """Refuse to compare results with those of the start, or the best, on other held-out data.

    With `data.validation_path` in `checkpoint.allow_changed`, changes since the start are left out.

    Raises:
        ConfigError: the held-out data is not that of the checkpoint.
    """
    state = None if starts_afresh(config) else newest_state(config.run.dir)
    saved = ((state or {}).get("first_results") or {}).get("data_hash", data_hash)
    best = config.checkpoint.keep_best
    if saved == data_hash or (
        best is None and "data.validation_path" in config.checkpoint.allow_changed
    ):
        return
    remedy = (
        "Use the same file, or name the key in checkpoint.allow_changed to go on without changes "
        "since the start."
        if best is None
        else f"Use the same file, by which checkpoint.keep_best={best} was found."
    )
    raise ConfigError(
        f"data.validation_path={show_sources(config.data.validation_path)}: must hold the rows of "
        f"the checkpoint, sha256 {saved}; it is {data_hash}. {remedy}"
    )


def check_fresh_start(config: Config) -> None:
    """Refuse to start afresh with `checkpoint.resume=must`."""
    if config.checkpoint.resume == "must":
        raise ConfigError(
            f"checkpoint.resume=must: {config.run.dir} has no checkpoint that can be loaded. "
            "Set it to auto to start afresh."
        )


def check_settings(saved: Mapping[str, Any], config: Config, job: Job) -> None:
    """Refuse settings that make another run of it.

    Args:
        saved: what `settings_of` returned when what there is was written.
        config: of this run.
        job: only the sections it reads are compared.

    Raises:
        ConfigError: with each key that differs and both values.
    """
    present = settings_of(config)
    free = {*config.checkpoint.allow_changed}
    if job != "ppo":
        free.add("rollout.batch_size")
    what = "answers that are there" if job == "generate" else "checkpoint"
    different = [
        f"{key}={new}: must be as in the {what}, {old}"
        for key, old, new in _pairs(saved, present, (*_SHARED, *read_sections(config, job)))
        if old != new and not {key, key.partition(".")[0]} & free
    ]
    if different:
        raise ConfigError(
            f"{'; '.join(different)}. Set it back, name it in checkpoint.allow_changed, or use "
            "another run.dir."
        )


def _pairs(
    saved: Mapping[str, Any], present: Mapping[str, Any], sections: Sequence[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the key, old and new value of every setting that both have."""
    yield "run.seed", saved.get("run", present["run"])["seed"], present["run"]["seed"]
    for section in sections:
        old = saved.get(section, {})
        for name, value in present[section].items():
            key = f"{section}.{name}"
            if name in old and key not in _FREE and name not in _FREE_NAMES:
                yield key, old[name], value
