"""Rules that need more than one section, the job, or the size of the world."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from marlhf_mega.config.limits import context_multiple
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import Config, MemoryConfig, ParallelConfig, RolloutConfig

Job = Literal["sft", "reward", "ppo", "offline", "evaluate", "generate"]
WITHOUT_TRAINING: tuple[Job, ...] = ("evaluate", "generate")
GENERATING: tuple[Job, ...] = ("ppo", "offline", *WITHOUT_TRAINING)


def rollout_ranks(config: Config, job: str) -> int:
    """Return how many ranks of a job only generate; other jobs than ppo have none."""
    return config.rollout.ranks if job == "ppo" else 0


def check_world(config: Config, world_size: int, *, apart: int = 0) -> int:
    """Check that the layout fits the model and the ranks.

    Args:
        config: the resolved configuration.
        world_size: number of ranks.
        apart: so many of them only generate.

    Returns:
        The data-parallel size of training.

    Raises:
        ConfigError: one line for every rule that is broken.
    """
    if apart >= world_size:
        raise ConfigError(
            f"rollout.ranks={apart}: must leave ranks that train; {world_size} are started. Lower "
            "it or start more ranks."
        )
    num_training = world_size - apart
    problems = list(_layout_problems(config, config.parallel, "parallel", num_training))
    if (apart or config.moves_weights) and not problems:
        num_generating = apart or world_size
        problems += _layout_problems(config, config.rollout_parallel, "rollout", num_generating)
    if problems:
        raise ConfigError("\n".join(problems))
    return num_training // config.parallel.model_size


def check_other_model(
    config: Config, model: ModelConfig, num_ranks: int, *, what: str, learns: bool
) -> None:
    """Check that the layout fits a model of another shape than the policy's.

    Args:
        config: the resolved configuration.
        model: the other model's shape.
        num_ranks: that train.
        what: the key and the path that name it, for messages.
        learns: it is a critic.

    Raises:
        ConfigError: one line for every rule that is broken.
    """
    # It never generates, and what does not learn recomputes nothing.
    other: dict[str, Any] = {"model": model, "rollout": RolloutConfig()}
    if not learns:
        other |= {"precision": config.precision.frozen(), "memory": MemoryConfig()}
    changed = config.model_copy(update=other)
    problems = list(_layout_problems(changed, config.parallel, "parallel", num_ranks))
    if problems:
        raise ConfigError("\n".join(f"{what}: {problem}" for problem in problems))


def check_job(config: Config, job: Job, data_size: int) -> None:
    """Check what one job needs: its files, its folder and its batch arithmetic.

    Args:
        config: the resolved configuration.
        job: which command runs.
        data_size: data-parallel size.

    Raises:
        ConfigError: one line for every rule that is broken.
    """
    problems = [
        *_file_problems(config, job),
        *_folder_problems(config.run.dir, key="run.dir"),
        *_replacing_problems(config, job),
        *_size_problems(config, job, data_size),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def check_sizes(config: Config, job: Job, data_size: int) -> None:
    """Check what `check_job` does, except that files need not be there.

    Raises:
        ConfigError: one line for every rule that is broken.
    """
    problems = list(_size_problems(config, job, data_size))
    if problems:
        raise ConfigError("\n".join(problems))


def check_folder(path: Path, *, key: str) -> None:
    """Check that a folder can be written to, or made, as far as looking tells.

    Raises:
        ConfigError: a file is in its way, or it is not ours to write.
    """
    if problems := list(_folder_problems(path, key=key)):
        raise ConfigError("\n".join(problems))


def _size_problems(config: Config, job: Job, data_size: int) -> Iterator[str]:
    yield from _length_problems(config, job)
    yield from _batch_problems(config, job, data_size)
    yield from _router_problems(config, job)
    if job == "ppo":
        yield from _ppo_problems(config)
        yield from _sampler_problems(config)
        yield from _separate_problems(config)
    yield from _offload_problems(config, job)
    if job in ("ppo", *WITHOUT_TRAINING):
        yield from _budget_problems(config)
    if job == "offline":
        yield from _offline_problems(config)


def _layout_problems(
    config: Config, parallel: ParallelConfig, section: str, world_size: int
) -> Iterator[str]:
    model = config.model
    tensor, pipeline = parallel.tensor_size, parallel.pipeline_size
    if world_size % parallel.model_size:
        yield (
            f"{section}: tensor_size * pipeline_size * context_size = {parallel.model_size} must "
            f"divide the number of ranks; it is {world_size}. Start a multiple of "
            f"{parallel.model_size} ranks."
        )
    elif (world_size // pipeline) % parallel.expert_size:
        yield (
            f"parallel.expert_size={parallel.expert_size}: must divide the ranks of one pipeline "
            f"stage, {world_size // pipeline}. Lower it or start more ranks."
        )
    if model.num_attention_heads % tensor:
        yield (
            f"{section}.tensor_size={tensor}: must divide model.num_attention_heads="
            f"{model.num_attention_heads}. Use {_divisors(model.num_attention_heads)}."
        )
    elif model.query_groups % tensor and tensor % model.query_groups:
        yield (
            f"{section}.tensor_size={tensor}: must divide model.num_query_groups="
            f"{model.query_groups} or be a multiple of it. Use {_divisors(model.query_groups)}."
        )
    elif (
        rows := model.kv_channels * (model.num_attention_heads + 2 * model.query_groups)
    ) % tensor:
        yield (
            f"{section}.tensor_size={tensor}: more ranks than model.num_query_groups="
            f"{model.query_groups} cut queries, keys and values together, whose {rows} rows it "
            f"must divide. Use {_divisors(model.query_groups)}."
        )
    for key in ("ffn_hidden_size", "shared_expert_ffn_hidden_size"):
        width = getattr(model, key)
        if width is not None and width % tensor:
            yield (
                f"{section}.tensor_size={tensor}: must divide model.{key}={width}. "
                "Use another size."
            )
    chunks = pipeline * parallel.virtual_pipeline_size
    if model.num_layers % chunks:
        yield (
            f"{section}.pipeline_size={pipeline} times virtual_pipeline_size="
            f"{parallel.virtual_pipeline_size}: must divide model.num_layers={model.num_layers}. "
            f"Use a product among {_divisors(model.num_layers)}."
        )
    if parallel.virtual_pipeline_size > 1 and pipeline == 1:
        yield (
            f"parallel.virtual_pipeline_size={parallel.virtual_pipeline_size}: needs "
            "parallel.pipeline_size > 1; it is 1. Set it to 1."
        )
    if section == "parallel":
        yield from _recompute_problems(config)
        yield from _fp8_problems(config)
        yield from _graph_problems(config)
    yield from _fp8_width_problems(config, parallel, section)
    yield from _expert_problems(config, parallel, section)


def _fp8_problems(config: Config) -> Iterator[str]:
    """Rules that hold on every GPU; whether this one can is asked of the platform."""
    precision, parallel, model = config.precision, config.parallel, config.model
    if precision.fp8 == "off":
        return
    if precision.dtype == "float32":
        yield (
            "precision.dtype=float32: FP8 needs bfloat16 beside it. Set it to bfloat16, or "
            "precision.fp8=off."
        )
    if model.post_norms or model.attention_softcap is not None:
        yield (
            f"precision.fp8={precision.fp8}: Transformer Engine has neither softcaps nor post "
            f"norms; model.architecture={model.architecture} has. Set it to off."
        )
    edge, here = precision.fp8_edge_layers_bf16, model.num_layers // parallel.pipeline_size
    if edge and precision.fp8_recipe == "delayed":
        yield (
            f"precision.fp8_edge_layers_bf16={edge}: delayed scaling covers all layers. Set it "
            "to 0, or another precision.fp8_recipe."
        )
    elif edge > here:
        yield (
            f"precision.fp8_edge_layers_bf16={edge}: must not exceed the {here} layers of a "
            "pipeline stage. Lower it."
        )
    if precision.fp8_param_gather and precision.fp8_recipe == "mxfp8" and parallel.overlap:
        yield (
            "parallel.overlap=true: weights in mxfp8 travel through the gradients' memory, which "
            "the next step needs. Set it to false, or precision.fp8_param_gather=false."
        )
    if precision.fp8_param_gather and (config.rollout.ranks or config.moves_weights):
        yield (
            "precision.fp8_param_gather=true: weights in FP8 cannot move to ranks or a layout of "
            "the rollout's own. Set it to false, or leave out rollout.ranks, rollout.tensor_size "
            "and rollout.pipeline_size."
        )


def _graph_problems(config: Config) -> Iterator[str]:
    """Rules that hold on every GPU: a graph repeats kernels without asking the CPU."""
    if not config.rollout.cuda_graphs:
        return
    if config.model.num_experts:
        yield (
            "rollout.cuda_graphs=true: cannot hold experts, whose tokens the CPU counts; "
            f"model.num_experts={config.model.num_experts}. Set it to false."
        )
    if config.precision.fp8 != "off":
        yield (
            "rollout.cuda_graphs=true: cannot hold FP8, whose scales the CPU minds; "
            f"precision.fp8={config.precision.fp8}. Set it to false."
        )


def _fp8_width_problems(config: Config, parallel: ParallelConfig, section: str) -> Iterator[str]:
    """Rows and columns of a rank's matrices; experts are not cut by tensor parallelism."""
    if config.precision.fp8 == "off":
        return
    model, tensor = config.model, parallel.tensor_size
    heads, groups = model.num_attention_heads, model.query_groups
    # With more ranks than groups every rank holds one group whole.
    widths = {
        "hidden_size": model.hidden_size,
        "num_attention_heads * head size": heads * model.kv_channels / tensor,
        "num_query_groups * head size": groups * model.kv_channels / min(tensor, groups),
        "ffn_hidden_size": model.ffn_hidden_size / tensor,
        "expert_ffn_hidden_size": model.expert_ffn_hidden_size or 0,
        "shared_expert_ffn_hidden_size": (model.shared_expert_ffn_hidden_size or 0) / tensor,
    }
    for key, width in widths.items():
        if width % config.precision.fp8_alignment:
            yield (
                f"model.{key}: precision.fp8_recipe={config.precision.fp8_recipe} needs a multiple "
                f"of {config.precision.fp8_alignment} on every rank; {section}.tensor_size="
                f"{tensor} leaves {width:g}. Use another recipe or layout, or precision.fp8=off."
            )


def _recompute_problems(config: Config) -> Iterator[str]:
    memory, parallel = config.memory, config.parallel
    layers = memory.recompute_num_layers
    if layers is None:
        return
    here = config.model.num_layers // (parallel.pipeline_size * parallel.virtual_pipeline_size)
    if memory.recompute != "full":
        yield (
            f"memory.recompute_num_layers={layers}: needs memory.recompute=full; it is "
            f"{memory.recompute}. Leave it out or set memory.recompute=full."
        )
    elif layers > here:
        yield (
            f"memory.recompute_num_layers={layers}: must not exceed the {here} layers of a "
            "stage's chunk. Lower it, or leave it out for all of them."
        )


def _expert_problems(config: Config, parallel: ParallelConfig, section: str) -> Iterator[str]:
    experts = config.model.num_experts
    if parallel.expert_size > 1 and experts is None:
        yield f"parallel.expert_size={parallel.expert_size}: the model has no experts. Set it to 1."
    elif experts and experts % parallel.expert_size:
        yield (
            f"parallel.expert_size={parallel.expert_size}: must divide model.num_experts="
            f"{experts}. Use {_divisors(experts)}."
        )
    if experts and parallel.tensor_size > 1 and not parallel.sequence_parallel:
        yield (
            f"parallel.sequence_parallel=false: experts with {section}.tensor_size > 1 need it. "
            "Set it to true."
        )


def _file_problems(config: Config, job: Job) -> Iterator[str]:
    keys = {"validation_path": config.data.validation_path}
    if job not in WITHOUT_TRAINING:
        keys["train_path"] = config.data.train_path
    for key, path in keys.items():
        optional = key == "validation_path" and job not in WITHOUT_TRAINING
        if path is None and not optional:
            yield f"data.{key}: {job} needs it; it is not set. Give a .jsonl or .parquet file."
        elif path is not None and not Path(path).is_file():
            yield f"data.{key}={path}: no such file. Give a .jsonl or .parquet file."


def _folder_problems(path: Path, *, key: str) -> Iterator[str]:
    absolute = path.absolute()
    nearest = next(p for p in (absolute, *absolute.parents) if os.path.lexists(p))
    reason = None
    if not nearest.is_dir():
        reason = "is not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        reason = "cannot be written to"
    if reason is not None:
        yield (
            f"{key}={path}: must be a folder that can be written to; {nearest} {reason}. Use "
            "another folder."
        )


def _replacing_problems(config: Config, job: Job) -> Iterator[str]:
    if job in WITHOUT_TRAINING and (config.run.dir / "checkpoints").is_dir():
        yield (
            f"run.dir={config.run.dir}: holds a training run, whose config.yaml and samples "
            f"{job} would replace. Name another folder."
        )


def _length_problems(config: Config, job: Job) -> Iterator[str]:
    sections = {"rollout": job in GENERATING, "data": job in ("sft", "reward", "offline")}
    for section in (name for name, is_used in sections.items() if is_used):
        longest = config.data.max_prompt_tokens + getattr(config, section).max_response_tokens
        if longest > config.model.max_positions:
            yield (
                f"{section}.max_response_tokens: with data.max_prompt_tokens="
                f"{config.data.max_prompt_tokens} it must fit in model.max_positions="
                f"{config.model.max_positions}; the sum is {longest}. Lower one of them."
            )


def _batch_problems(config: Config, job: Job, data_size: int) -> Iterator[str]:
    batches = {
        "sft": {"sft.batch_size": config.sft.batch_size},
        "reward": {"reward_model.batch_size": config.reward_model.batch_size},
        "ppo": {
            "rollout.batch_size": config.rollout.batch_size,
            "ppo.minibatch_size": config.ppo.minibatch_size,
        },
        "offline": {"offline.batch_size": config.offline.batch_size},
        "evaluate": {},
        "generate": {},
    }[job]
    stages = config.parallel.pipeline_size if config.parallel.virtual_pipeline_size > 1 else 1
    for key, size in batches.items():
        if stages > 1 and size // data_size < stages:
            yield (
                f"{key}={size}: an interleaved pipeline of {stages} stages needs at least "
                f"{stages * data_size}. Raise it or set parallel.virtual_pipeline_size=1."
            )
        elif stages > 1 and job == "reward":
            yield from _pair_problems(config, size // data_size, stages * data_size)
        if size % data_size:
            lower, higher = size // data_size * data_size, (size // data_size + 1) * data_size
            yield (
                f"{key}={size}: must be a multiple of the data-parallel size {data_size}. "
                f"Use {f'{lower} or {higher}' if lower else higher}."
            )


def _pair_problems(config: Config, share: int, multiple: int) -> Iterator[str]:
    """Unlike sequences, pairs cannot be filled up to what an interleaved pipeline needs."""
    size, stages = config.reward_model.microbatch_size, config.parallel.pipeline_size
    needed = -(-share // size)
    if -(-needed // stages) * stages > share:
        yield (
            f"reward_model.microbatch_size={size}: cuts the {share} pairs of a rank to {needed} "
            f"microbatches; an interleaved pipeline needs a multiple of its {stages} stages. Raise "
            f"it, or make reward_model.batch_size a multiple of {multiple}."
        )


def _router_problems(config: Config, job: Job) -> Iterator[str]:
    """Megatron weighs the router's loss by tokens; beside a mean of few terms it would be all."""
    coefficient = config.model.router_aux_loss_coef
    terms = {"reward": "pairs", "offline": "responses"}.get(job)
    if job == "ppo" and config.ppo.aggregation != "token_mean":
        terms = f"ppo.aggregation={config.ppo.aggregation}"
    if coefficient and terms:
        yield (
            f"model.router_aux_loss_coef={coefficient}: has its weight beside a mean over tokens "
            f"only; {job} takes one over {terms}. Set it to 0."
        )


def _ppo_problems(config: Config) -> Iterator[str]:
    if not config.reward.source:
        yield (
            "reward.source: ppo needs a reward. Give a reward model's directory or a rule "
            "module:function."
        )
    if config.rollout.temperature == 0:
        yield "rollout.temperature=0.0: ppo needs random samples. Use a value above 0, such as 1."
    if config.rollout.batch_size % config.ppo.minibatch_size:
        yield (
            f"ppo.minibatch_size={config.ppo.minibatch_size}: must divide rollout.batch_size="
            f"{config.rollout.batch_size}. Use {_divisors(config.rollout.batch_size)}."
        )


def _sampler_problems(config: Config) -> Iterator[str]:
    if config.ppo.old_logprobs == "sampler" and config.ppo.sampler_cap is not None:
        yield (
            f"ppo.sampler_cap={config.ppo.sampler_cap}: needs the trainer's log-probs beside the "
            "sampler's. Set ppo.old_logprobs=trainer, or ppo.sampler_cap=null."
        )


def _separate_problems(config: Config) -> Iterator[str]:
    """Ranks that only generate."""
    rollout, ppo, precision = config.rollout, config.ppo, config.precision
    if rollout.staleness and not rollout.ranks:
        yield (
            f"rollout.staleness={rollout.staleness}: needs rollout.ranks > 0, or nothing would "
            "overlap; it is 0. Set rollout.ranks, or rollout.staleness=0."
        )
    if rollout.staleness and ppo.old_logprobs == "trainer" and ppo.sampler_cap is None:
        yield (
            f"rollout.staleness={rollout.staleness}: samples of older weights need "
            "ppo.sampler_cap; it is not set. Set it to 2, say, or ppo.old_logprobs=sampler."
        )
    if rollout.ranks and precision.fp8 != "off" and precision.fp8_on_divergence == "leave":
        yield (
            "precision.fp8_on_divergence=leave: ranks that only generate would not leave FP8. Set "
            "it to warn, or rollout.ranks=0."
        )


def _offload_problems(config: Config, job: Job) -> Iterator[str]:
    for key in ("offload_idle", "offload_optimizer"):
        if not getattr(config.memory, key):
            continue
        if job in ("sft", "reward", "offline"):
            yield (
                f"memory.{key}=true: only ppo has phases in which models rest; this is {job}. Set "
                "it to false."
            )
        if config.precision.fp8_param_gather:
            yield (
                f"memory.{key}=true: weights in FP8 cannot leave the GPU. Set it to false, or "
                "precision.fp8_param_gather=false."
            )


def _budget_problems(config: Config) -> Iterator[str]:
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    parallel, packs = config.parallel, config.ppo.packing
    multiple = context_multiple(parallel.context_size)
    if parallel.sequence_parallel and not packs:
        multiple *= parallel.tensor_size
    longest = -(-longest // multiple) * multiple
    if config.ppo.microbatch_tokens is not None and config.ppo.microbatch_tokens < longest:
        yield (
            f"ppo.microbatch_tokens={config.ppo.microbatch_tokens}: must hold the longest "
            f"sequence, data.max_prompt_tokens + rollout.max_response_tokens = {longest}"
            f"{'' if packs and multiple == 1 else ' with padding'}. Use at least {longest}."
        )


def _offline_problems(config: Config) -> Iterator[str]:
    if not config.offline.needs_values:
        return
    why = (
        f"offline.algorithm={config.offline.algorithm} with offline.sampling="
        f"{config.offline.sampling} compares each reward with what the prompt is worth"
    )
    if not config.reward.source:
        yield (
            f"reward.source: {why}, which is learned from scored responses; it is not set. Give "
            "a reward model's directory or a rule module:function."
        )
    if config.data.validation_path is None:
        yield (
            f"data.validation_path: {why}, which is learned from answers to these prompts; it is "
            "not set. Give a file of prompts."
        )


def _divisors(number: int) -> str:
    found = [str(d) for d in range(1, min(number, 4096) + 1) if number % d == 0]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1]
