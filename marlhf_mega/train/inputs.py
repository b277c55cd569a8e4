"""Everything a job reads before ranks meet: tokenizer, data, origins. User mistakes end here."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from marlhf_mega import platform
from marlhf_mega.config.checks import (
    WITHOUT_TRAINING,
    Job,
    check_job,
    check_world,
    generates,
    read_sections,
    rollout_ranks,
)
from marlhf_mega.config.hf_write import hf_config_from_model
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.data import DataSource
from marlhf_mega.data.contexts import InContext
from marlhf_mega.data.datasets import ExampleBuilder, PreferencePair, Prompt
from marlhf_mega.data.files import RowKind, data_hash
from marlhf_mega.data.stream import SampleStream, SourcePart, epoch_size
from marlhf_mega.data.token_cache import Build, examples_of, joined
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.experience.parsers import load_parser
from marlhf_mega.metrics.diversity import check_self_bleu
from marlhf_mega.metrics.writers import check_wandb
from marlhf_mega.plan.parameters import whole_model_size
from marlhf_mega.platform import vllm
from marlhf_mega.rewards.rule import check_importable
from marlhf_mega.train.best import check_best
from marlhf_mega.train.origins import check_origins, check_same_tokenizer, policy_origin
from marlhf_mega.train.resume import check_resume, check_same_held_out

logger = logging.getLogger(__name__)

Example = TypeVar("Example")

_Reading = tuple[RowKind, Build[Any]]
_PROMPTS: _Reading = ("prompts", ExampleBuilder.prompts)
_PAIRS: _Reading = ("preferences", ExampleBuilder.preferences)
_EXAMPLES: dict[Job, _Reading] = {
    "sft": ("sft", ExampleBuilder.supervised),
    "reward": _PAIRS,
    "preference": _PAIRS,
    "ppo": _PROMPTS,
    "offline": ("offline", ExampleBuilder.offline),
    "evaluate": _PROMPTS,
    "generate": _PROMPTS,
}
"""What the rows of a job's training file are made into."""

SLOWEST_BYTES = 250e6
"""Bytes per second at which all ranks together must be able to write."""


@dataclass(frozen=True, kw_only=True)
class Inputs(Generic[Example]):
    """What a job trains and is judged on."""

    config: Config
    """With the vocabulary size filled in."""
    tokenizer: Tokenizer
    tokenizer_path: Path
    train: Sequence[Example]
    """Empty for jobs that do not train."""
    parts: Sequence[SourcePart]
    """Of `train`, one for each file."""
    validation: Sequence[Any]
    """Empty where no file is given."""
    validation_sources: Sequence[str] = ()
    """The path that each of them is from, as `data.validation_path` gives it."""
    data_hash: str
    """sha256 of the training data."""
    validation_hash: str = ""
    """sha256 of the held-out data; empty for jobs that do not train."""

    @property
    def epoch_size(self) -> int:
        """Training examples of one epoch."""
        return epoch_size(self.parts)

    def references(self, prompts: Sequence[Prompt]) -> list[list[list[int]]] | None:
        """Tokenise the responses that `reward.shaping` compares with, if it does.

        Raises:
            ValueError: a row holds something else.
        """
        reward, longest = self.config.reward, self.config.rollout.max_response_tokens
        if not reward.compares_references:
            return None
        reader = _reader(self.config, self.tokenizer, source="", max_response_tokens=longest)
        return [reader.references(prompt, reward.reference_field) for prompt in prompts]

    def stream(self, batch_size: int) -> SampleStream:
        """Return the order of the training examples, epoch after epoch."""
        return SampleStream(
            self.parts,
            batch_size=batch_size,
            seed=self.config.run.seed,
            shuffle=self.config.data.shuffle,
            data_hash=self.data_hash,
        )


def read_inputs(config: Config, job: Job, world_size: int) -> Inputs[Any]:
    """Check the configuration, models and machine, and read all files. Does not communicate.

    Args:
        config: of the run.
        job: the command.
        world_size: ranks that are started.

    Raises:
        ValueError: anything the user has to fix.
    """
    num_rollout_ranks = rollout_ranks(config, job)
    data_size = check_world(config, world_size, num_rollout_ranks=num_rollout_ranks)
    check_job(config, job, data_size)
    check_machine(config, job)
    tokenizer_path = _tokenizer_path(config)
    tokenizer = Tokenizer.load(
        tokenizer_path,
        model=config.model.hf_path,
        stop=config.rollout.stop,
        keep_special=config.rollout.keep_special_tokens,
    )
    config = with_time_to_write(_with_vocabulary(config, tokenizer), job)
    _check_engine_model(config, job)
    sources = () if job in WITHOUT_TRAINING else config.data.train_path or ()
    train_hash = data_hash(sources) if sources else ""
    validation_hash = ""
    if job not in WITHOUT_TRAINING:
        _check_export(config)
        check_best(config)
        check_resume(
            config, job, train_hash, tokenizer.fingerprint(), tokenizer.prompt_fingerprint()
        )
        if config.data.validation_path:
            validation_hash = data_hash(config.data.validation_path)
            check_same_held_out(config, validation_hash)
    check_origins(config, job, tokenizer, world_size - num_rollout_ranks)
    held_out: Job = "ppo" if generates(config, job) else job
    train = list(_examples(config, tokenizer, sources, job))
    validation = list(_examples(config, tokenizer, config.data.validation_path or (), held_out))
    found: Inputs[Any] = Inputs(
        config=config,
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
        train=joined([examples for _, examples in train]),
        parts=[SourcePart(len(examples), source.weight) for source, examples in train],
        validation=joined([examples for _, examples in validation]),
        validation_sources=[source.path for source, examples in validation for _ in examples],
        data_hash=train_hash,
        validation_hash=validation_hash,
    )
    if generates(config, job):
        _check_first_rows(found, job)
    return _in_context(found) if job == "reward" and config.reward_model.latent_size else found


def _in_context(inputs: Inputs[PreferencePair]) -> Inputs[PreferencePair]:
    """Put every pair beside others of its user; raises ValueError where there are none."""
    size, seed = inputs.config.reward_model.latent_context, inputs.config.run.seed
    return replace(
        inputs,
        train=InContext(inputs.train, size=size, seed=seed, key="data.train_path"),
        validation=InContext(inputs.validation, size=size, seed=seed, key="data.validation_path"),
    )


def _check_first_rows(inputs: Inputs[Any], job: Job) -> None:
    """Refuse data without the fields that rewards read, judged by the first rows."""
    reward = inputs.config.reward
    trained = inputs.train[:1] if job in ("ppo", "preference") else []
    if inputs.references(trained) == [[]]:
        raise ConfigError(
            f"reward.reference_field={reward.reference_field}: must name a field of the data rows, "
            "a text or a list of texts, for reward.shaping to compare with; the first row has "
            "none. Add it, or name another field."
        )
    for prompt in (*trained, *inputs.validation[:1]):
        for judge in reward.models:
            known = {"prompt", "response", *prompt.row}
            missing = [name for name in judge.template_fields if name not in known]
            if missing:
                raise ConfigError(
                    f"{judge.key}={judge.source}: its template names {missing[0]}, which must be a "
                    "field of the data rows; the first row has none. Add it, or change the "
                    "template."
                )


def _examples(
    config: Config, tokenizer: Tokenizer, sources: Sequence[DataSource], job: Job
) -> Iterator[tuple[DataSource, Sequence[Any]]]:
    """Yield the examples of every file, with the source that names it."""
    kind, build = _EXAMPLES[job]
    if job == "offline" and config.offline.sampling == "all_priority":
        kind, build = "offline_pairs", ExampleBuilder.offline_pairs
    if job == "preference" and config.preference.is_online:
        kind, build = _PROMPTS
    if job == "preference" and config.preference.loss == "pro":
        kind, build = "ranked", ExampleBuilder.ranked
    for source, path in [(each, path) for each in sources for path in each.files()]:
        longest = config.data.max_response_tokens
        builder = _reader(config, tokenizer, source=path, max_response_tokens=longest)
        found = examples_of(path, kind, build, builder, fields=config.data.fields)
        if builder.report.has_changes:
            level = logging.WARNING if builder.report.num_control_tokens else logging.INFO
            logger.log(level, "%s: %s", path, builder.report)
        yield source, found


def _reader(
    config: Config, tokenizer: Tokenizer, *, source: str, max_response_tokens: int
) -> ExampleBuilder:
    return ExampleBuilder(
        tokenizer=tokenizer,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        long_prompts=config.data.long_prompts,
        control_tokens=config.data.control_tokens,
        turns=config.sft.turns,
        source=source,
    )


def with_time_to_write(config: Config, job: Job) -> Config:
    """Return limits of saves and exports that large models can keep, where no key sets them.

    A checkpoint has a parameter, its float32 master weight and two moments.
    """
    watchdog = config.watchdog
    if watchdog.seconds is None or job in WITHOUT_TRAINING:
        return config
    element = 4 if config.precision.dtype == "float32" else 2
    num_models = 2 if job == "ppo" else 1  # the critic is taken to be as large as the policy
    parameters = num_models * whole_model_size(config.model, "language")
    seconds = {
        "checkpoint_seconds": math.ceil(parameters * (element + 12) / SLOWEST_BYTES),
        "export_seconds": math.ceil(parameters * element / SLOWEST_BYTES),
    }
    longer = {
        name: float(needed)
        for name, needed in seconds.items()
        if getattr(watchdog, name) is None and needed > watchdog.seconds
    }
    return config.model_copy(update={"watchdog": watchdog.model_copy(update=longer)})


def check_machine(config: Config, job: Job) -> None:
    """Check that this machine has the device and the code that the job will use.

    Raises:
        ValueError: with the key that asks for what is not here.
    """
    check_wandb(config.logging.wandb)
    _check_device(config)
    if config.macro.rule == "parsing" and "macro" in read_sections(config, job):
        load_parser(config.macro.parser)
    if not generates(config, job):
        return
    _check_engine(config)
    check_self_bleu(config.evaluate.self_bleu)
    for judge in config.reward.judges:
        if judge.is_rule:
            check_importable(judge.source, sandbox=judge.sandbox, key=judge.key)
    if config.evaluate.gold is not None and job != "generate":
        check_importable(config.evaluate.gold, key="evaluate.gold")


def _check_device(config: Config) -> None:
    if config.rollout.cuda_graphs and platform.current().name != "cuda":
        raise ConfigError(
            "rollout.cuda_graphs=true: needs a CUDA device; there is none. Set it to false."
        )
    _check_attention(config)
    if config.precision.fp8 == "off":
        return
    support = platform.current().supports_fp8(config.precision.fp8_recipe)
    if not support:
        raise ConfigError(
            f"precision.fp8={config.precision.fp8}: cannot be used here; {support.reason}. "
            "Set it to off, or choose another precision.fp8_recipe."
        )


def _check_attention(config: Config) -> None:
    """Refuse a choice of kernels that is ignored, or that Megatron-Core would contradict."""
    backend, engine = config.precision.attention_backend, platform.current().transformer_engine
    if backend != "auto" and not engine:
        raise ConfigError(
            f"precision.attention_backend={backend}: chooses a kernel of Transformer Engine, which "
            f"cannot be used here; {engine.reason}. Set it to auto."
        )
    wanted = {name: str(int(backend in ("auto", name))) for name in ("flash", "fused", "unfused")}
    for name, value in wanted.items():
        variable = f"NVTE_{name.upper()}_ATTN"
        if os.environ.get(variable, value) != value:
            raise ConfigError(
                f"precision.attention_backend={backend}: needs {variable}={value}; the environment "
                f"has {os.environ[variable]}. Unset it, and choose the kernel by this key."
            )


def _check_engine(config: Config) -> None:
    """Refuse an engine that is not here, or that does not take the model's heads."""
    if config.rollout.engine != "vllm":
        return
    support, size = vllm.support(), config.model.kv_channels
    if not support:
        raise ConfigError(
            f"rollout.engine=vllm: needs vLLM; {support.reason}. Run `pip install "
            "'marlhf-mega[vllm]'`, or use rollout.engine=own."
        )
    if not vllm.takes_head_size(size):
        sizes = ", ".join(map(str, vllm.CPU_HEAD_SIZES))
        raise ConfigError(
            f"rollout.engine=vllm: on CPUs vLLM takes heads of {sizes} numbers; the model's have "
            f"{size}. Use rollout.engine=own."
        )


def _check_engine_model(config: Config, job: Job) -> None:
    """Refuse a model that an engine could not be told of: Hugging Face has nothing like it."""
    if config.rollout.engine != "vllm" or not generates(config, job):
        return
    try:
        hf_config_from_model(config.model)
    except ValueError as error:
        raise ConfigError(
            f"{error}\nrollout.engine=vllm: loads such a model. Use rollout.engine=own."
        ) from None


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
    is_random = model.init == "random" or (model.init == "auto" and model.hf_path is None)
    if model.vocab_size < size and is_random:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}: must hold the tokenizer's {size} tokens. "
            "Raise it, or use the tokenizer that belongs to the model."
        )
    # Trained models may lack tokens that no text needs; those of every text must be there.
    largest = max(tokenizer.eos_id, tokenizer.turn_end.id, *tokenizer.prompt_prefix)
    if model.vocab_size <= largest:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}: must hold the tokens that begin and end texts; "
            f"{tokenizer.piece(largest)!r} is id {largest}. Use the tokenizer that belongs to the "
            "model."
        )
    tokenizer.fit(model.vocab_size)
    origin = policy_origin(config)
    if origin is not None and origin.path != _tokenizer_path(config):
        key = "model.hf_path" if model.init == "auto" else "model.init"
        check_same_tokenizer(origin, tokenizer, key=key)
    return config
