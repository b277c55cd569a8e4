"""Checks that involve several sections, the job or the number of ranks."""

import os
from collections.abc import Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from marlhf_mega.config.limits import context_multiple, round_up
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.lora import ATTENTION, FEED_FORWARD
from marlhf_mega.config.methods import (
    method_problems,
    online_problems,
    preference_problems,
    reward_model_problems,
)
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.hardware import MemoryConfig, ParallelConfig
from marlhf_mega.config.sections.rollout import RolloutConfig
from marlhf_mega.config.vllm import vllm_problems

TrainingJob = Literal["sft", "reward", "preference", "ppo", "offline"]
Job = TrainingJob | Literal["evaluate", "generate"]
SECTIONS = {
    "sft": "sft",
    "reward": "reward_model",
    "preference": "preference",
    "ppo": "ppo",
    "offline": "offline",
}
"""The section with the batch sizes of each training job."""
WITHOUT_TRAINING: tuple[Job, ...] = ("evaluate", "generate")
GENERATING: tuple[Job, ...] = ("ppo", "offline", *WITHOUT_TRAINING)

READ_SECTIONS: dict[Job, tuple[str, ...]] = {
    "sft": ("policy", "sft"),
    "reward": ("reward_model",),
    "preference": ("policy", "preference"),
    "ppo": ("policy", "critic", "rollout", "macro", "ppo", "reward"),
    "offline": ("policy", "critic", "rollout", "reward", "offline"),
    "evaluate": (),
    "generate": ("rollout", "reward"),
}
"""See `read_sections`; offline and preference may read more."""


def read_sections(config: Config, job: Job) -> tuple[str, ...]:
    """Return what decides the results of a job, besides the sections that all jobs share."""
    cuts = job == "offline" and config.offline.algorithm == "a_lol_macro"
    cuts = cuts or (job == "preference" and config.preference.has_actions)
    more: tuple[str, ...] = ("macro",) if cuts else ()
    if job == "preference" and config.preference.is_online:
        more = ("rollout", "reward")
    return (*READ_SECTIONS[job], *more)


def generates(config: Config, job: Job) -> bool:
    """Whether a job answers prompts, in training or to be judged."""
    return job in GENERATING or (job == "preference" and config.preference.is_online)


def rollout_ranks(config: Config, job: str) -> int:
    """Return the number of ranks that only generate; 0 for jobs other than ppo."""
    return config.rollout.ranks if job == "ppo" else 0


def check_world(config: Config, world_size: int, *, num_rollout_ranks: int = 0) -> int:
    """Check that the layout fits the model and the ranks.

    Args:
        config: the resolved configuration.
        world_size: number of ranks.
        num_rollout_ranks: how many of them only generate.

    Returns:
        The data-parallel size of training.

    Raises:
        ConfigError: one line for every problem.
    """
    if num_rollout_ranks >= world_size:
        raise ConfigError(
            f"rollout.ranks={num_rollout_ranks}: must leave ranks that train; {world_size} "
            "are started. Lower it or start more ranks."
        )
    num_training = world_size - num_rollout_ranks
    problems = list(_layout_problems(config, config.parallel, "parallel", num_training))
    if (num_rollout_ranks or config.moves_weights) and not problems:
        num_generating = num_rollout_ranks or world_size
        problems += _layout_problems(config, config.rollout_parallel, "rollout", num_generating)
    _refuse(problems)
    return num_training // config.parallel.model_size


def check_other_model(
    config: Config, model: ModelConfig, num_ranks: int, *, what: str, learns: bool
) -> None:
    """Check that the layout fits a model whose shape differs from the policy's.

    Args:
        config: the resolved configuration.
        model: shape of the other model.
        num_ranks: number of ranks that train.
        what: key and path that name the model, for messages.
        learns: whether it is trained, as a critic is.

    Raises:
        ConfigError: one line for every problem.
    """
    # It never generates, and a frozen model has no backward pass to recompute for.
    other: dict[str, Any] = {"model": model, "rollout": RolloutConfig()}
    if not learns:
        other |= {"precision": config.precision.frozen(), "memory": MemoryConfig()}
    changed = config.model_copy(update=other)
    problems = _layout_problems(changed, config.parallel, "parallel", num_ranks)
    _refuse(f"{what}: {problem}" for problem in problems)


def check_job(config: Config, job: Job, data_size: int) -> None:
    """Check what one job needs: its files, its folder and its batch sizes.

    Args:
        config: the resolved configuration.
        job: which command runs.
        data_size: data-parallel size.

    Raises:
        ConfigError: one line for every problem.
    """
    _refuse(
        [
            *_file_problems(config, job),
            *_folder_problems(config.run.dir, key="run.dir"),
            *_replacing_problems(config, job),
            *_against_problems(config, job),
            *_size_problems(config, job, data_size),
        ]
    )


def check_sizes(config: Config, job: Job, data_size: int) -> None:
    """Check what `check_job` does, without looking at files.

    Raises:
        ConfigError: one line for every problem.
    """
    _refuse(_size_problems(config, job, data_size))


def check_folder(path: Path, *, key: str) -> None:
    """Check that a folder is writable or can be created, without touching it.

    Raises:
        ConfigError: it is not.
    """
    _refuse(_folder_problems(path, key=key))


def _refuse(problems: Iterable[str]) -> None:
    if found := list(problems):
        raise ConfigError("\n".join(found))


def _size_problems(config: Config, job: Job, data_size: int) -> Iterator[str]:
    yield from _length_problems(config, job)
    yield from _batch_problems(config, job, data_size)
    yield from _router_problems(config, job)
    yield from _lora_problems(config, job)
    if job == "ppo":
        yield from _ppo_problems(config)
        yield from method_problems(config, data_size)
        yield from _rollout_rank_problems(config)
    yield from _offload_problems(config, job)
    if job in GENERATING:
        yield from vllm_problems(config, learns=job == "ppo")
    if job in ("ppo", *WITHOUT_TRAINING):
        yield from _budget_problems(config)
    if job == "offline":
        yield from _offline_problems(config)
    if job == "preference":
        yield from preference_problems(config)
        if config.preference.is_online:
            yield from online_problems(config)
    if job == "reward":
        yield from reward_model_problems(config)
    yield from _held_out_problems(config, job)
    yield from _effect_problems(config, job)


def _held_out_problems(config: Config, job: Job) -> Iterator[str]:
    """Refuse what cannot be judged."""
    settings = config.evaluate
    if not generates(config, job) or job == "generate":
        return
    if settings.samples_per_prompt > 1 and settings.temperature == 0:
        yield (
            f"evaluate.samples_per_prompt={settings.samples_per_prompt}: with "
            "evaluate.temperature=0 all responses to a prompt are the same. Set it to 1, or raise "
            "the temperature."
        )
    if settings.best_of_n and not config.reward.source:
        yield (
            "evaluate.best_of_n=true: takes the response with the highest score; reward.source is "
            "not set. Set it, or leave evaluate.best_of_n out."
        )


def _effect_problems(config: Config, job: Job) -> Iterator[str]:
    """Refuse keys that would change nothing, or not what they say."""
    macro, ppo, offline = config.macro, config.ppo, config.offline
    if "macro" in read_sections(config, job) and macro.rule == "token" and macro.min_length > 1:
        yield (
            f"macro.min_length={macro.min_length}: macro.rule=token makes actions of one "
            f"token. Use macro.rule=fixed_ngram macro.n={macro.min_length}, or remove it."
        )
    if job == "ppo":
        if macro.reward == "mean" and macro.discount == "per_token" and ppo.gamma != 1:
            yield (
                "macro.discount=per_token: discounts the token rewards of an action, of which "
                "macro.reward=mean takes the mean. Use macro.reward=sum, or "
                "macro.discount=per_macro."
            )
        if ppo.kl_target is not None and ppo.kl_coef == 0:
            yield (
                f"ppo.kl_target={ppo.kl_target:g}: the coefficient is adapted by factors; "
                "ppo.kl_coef=0 stays 0. Set ppo.kl_coef, or ppo.kl_target=null."
            )
    if job == "offline":
        sources = config.data.train_path or ()
        if offline.sampling != "all" and any(source.weight != 1 for source in sources):
            yield (
                f"offline.sampling={offline.sampling}: draws responses by their advantage, not by "
                "the weights of data.train_path. Remove these, or use offline.sampling=all."
            )
        if offline.algorithm == "a_lol_kl" and offline.kl_coef == 0:
            yield (
                "offline.kl_coef=0: offline.algorithm=a_lol_kl without it is a_lol. Set it, or "
                "use offline.algorithm=a_lol."
            )
        counts = offline.algorithm == "a_lol_ref_free" and offline.sampling == "all"
        if offline.compat == "lol_rl" and offline.sampling != "all_priority" and not counts:
            yield (
                "offline.compat=lol_rl: changes only offline.sampling=all_priority, and "
                "offline.algorithm=a_lol_ref_free with offline.sampling=all. Remove it."
            )
        for key in ("constraints", "dense", "shaping", "clip", "normalize", "missing_eos"):
            value = getattr(config.reward, key)
            if value not in ((), None, "none"):
                names = (str(getattr(item, "source", item)) for item in value)
                shown = f"[{','.join(names)}]" if isinstance(value, tuple) else value
                yield (
                    f"reward.{key}={shown}: shapes the scores of ppo; offline takes the rewards "
                    "of its rows as they are. Remove it."
                )


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
            f"{model.query_groups} must divide the {rows} rows of queries, keys and values "
            f"together. Use {_divisors(model.query_groups)}."
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
            f"Change one of them to make the product {_divisors(model.num_layers)}."
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
    """Rules for every GPU; whether this one supports FP8 is up to the platform."""
    precision, parallel, model = config.precision, config.parallel, config.model
    without_engine = model.post_norms or model.attention_softcap is not None
    if precision.attention_backend != "auto" and without_engine:
        yield (
            f"precision.attention_backend={precision.attention_backend}: chooses a kernel of "
            "Transformer Engine, which supports neither softcaps nor post norms; "
            f"model.architecture={model.architecture} has them. Set it to auto."
        )
    if precision.fp8 == "off":
        return
    if precision.dtype == "float32":
        yield (
            "precision.dtype=float32: FP8 needs bfloat16 for all else. Set it to bfloat16, or "
            "precision.fp8=off."
        )
    if without_engine:
        yield (
            f"precision.fp8={precision.fp8}: Transformer Engine supports neither softcaps nor "
            f"post norms; model.architecture={model.architecture} has them. Set it to off."
        )
    edge, here = precision.fp8_edge_layers_bf16, model.num_layers // parallel.pipeline_size
    if edge and precision.fp8_recipe == "delayed":
        yield (
            f"precision.fp8_edge_layers_bf16={edge}: delayed scaling always covers all layers. "
            "Set it to 0, or use another precision.fp8_recipe."
        )
    elif edge > here:
        yield (
            f"precision.fp8_edge_layers_bf16={edge}: must not exceed the {here} layers of a "
            "pipeline stage. Lower it."
        )
    if precision.fp8_param_gather and precision.fp8_recipe == "mxfp8" and parallel.overlap:
        yield (
            "parallel.overlap=true: mxfp8 weights are gathered in the gradients' memory, which "
            "the next step needs. Set it to false, or precision.fp8_param_gather=false."
        )
    if precision.fp8_param_gather and (config.rollout.ranks or config.moves_weights):
        yield (
            "precision.fp8_param_gather=true: FP8 weights cannot be resharded for generation. "
            "Set it to false, or remove rollout.ranks, rollout.engine, rollout.tensor_size and "
            "rollout.pipeline_size."
        )


def _graph_problems(config: Config) -> Iterator[str]:
    """Rules for every GPU: a graph replays kernels without the CPU."""
    if not config.rollout.cuda_graphs:
        return
    if config.model.num_experts:
        yield (
            "rollout.cuda_graphs=true: does not work with experts, whose tokens the CPU counts; "
            f"model.num_experts={config.model.num_experts}. Set it to false."
        )
    if config.precision.fp8 != "off":
        yield (
            "rollout.cuda_graphs=true: does not work with FP8, whose scales the CPU manages; "
            f"precision.fp8={config.precision.fp8}. Set it to false."
        )


def _fp8_width_problems(config: Config, parallel: ParallelConfig, section: str) -> Iterator[str]:
    """Rows and columns of a rank's matrices; tensor parallelism does not split experts."""
    if config.precision.fp8 == "off":
        return
    model, tensor = config.model, parallel.tensor_size
    heads, groups = model.num_attention_heads, model.query_groups
    # With more ranks than groups, every rank holds one whole group.
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
            f"{memory.recompute}. Remove it or set memory.recompute=full."
        )
    elif layers > here:
        yield (
            f"memory.recompute_num_layers={layers}: must not exceed the {here} layers of a "
            "stage's chunk. Lower it, or remove it to recompute all of them."
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
    for key, sources in keys.items():
        optional = key == "validation_path" and job not in WITHOUT_TRAINING
        if sources is None and not optional:
            yield f"data.{key}: {job} needs it; it is not set. Give a .jsonl or .parquet file."
        for source in sources or ():
            if not source.is_hub and not all(Path(file).is_file() for file in source.files()):
                yield f"data.{key}={source.path}: no such file. Give a .jsonl or .parquet file."
            elif source.weight != 1 and key == "validation_path":
                yield (
                    f"data.{key}={source.path}: is judged once, whole; its weight is "
                    f"{source.weight:g}. Remove the weight."
                )


def _folder_problems(path: Path, *, key: str) -> Iterator[str]:
    absolute = path.absolute()
    nearest = next(p for p in (absolute, *absolute.parents) if os.path.lexists(p))
    reason = None
    if not nearest.is_dir():
        reason = "is not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        reason = "is not writable"
    if reason is not None:
        yield f"{key}={path}: must be a writable folder; {nearest} {reason}. Use another folder."


def _replacing_problems(config: Config, job: Job) -> Iterator[str]:
    if job in WITHOUT_TRAINING and (config.run.dir / "checkpoints").is_dir():
        yield (
            f"run.dir={config.run.dir}: contains a training run, whose config.yaml and samples "
            f"{job} would overwrite. Use another folder."
        )


def _against_problems(config: Config, job: Job) -> Iterator[str]:
    evaluate = config.evaluate
    if job == "evaluate" and evaluate.against and not (config.reward.source or evaluate.gold):
        yield (
            f"evaluate.against={evaluate.against}: needs a judge of the answers; reward.source and "
            "evaluate.gold are not set. Set one of them."
        )


def _length_problems(config: Config, job: Job) -> Iterator[str]:
    online = generates(config, job) and job != "offline"
    sections = {"rollout": online or job == "offline", "data": job in SECTIONS and not online}
    for section in (name for name, is_used in sections.items() if is_used):
        longest = config.data.max_prompt_tokens + getattr(config, section).max_response_tokens
        if longest > config.model.max_positions:
            yield (
                f"{section}.max_response_tokens: with data.max_prompt_tokens="
                f"{config.data.max_prompt_tokens} it must fit in model.max_positions="
                f"{config.model.max_positions}; the sum is {longest}. Lower one of them."
            )


def _batch_problems(config: Config, job: Job, data_size: int) -> Iterator[str]:
    if job in WITHOUT_TRAINING:
        return
    keys = [f"{SECTIONS[job]}.batch_size"]
    if job == "ppo":
        keys = ["rollout.batch_size", "ppo.minibatch_size"]
    batches = {key: attrgetter(key)(config) for key in keys}
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
    """Pairs, unlike sequences, are never padded to what an interleaved pipeline needs."""
    size, stages = config.reward_model.microbatch_size, config.parallel.pipeline_size
    needed = -(-share // size)
    if round_up(needed, stages) > share:
        yield (
            f"reward_model.microbatch_size={size}: splits the {share} pairs of a rank into "
            f"{needed} microbatches; an interleaved pipeline needs a multiple of its {stages} "
            f"stages. Raise it, or make reward_model.batch_size a multiple of {multiple}."
        )


def _lora_problems(config: Config, job: Job) -> Iterator[str]:
    model, precision, lora = config.model, config.precision, config.model.lora
    if lora.path is not None and job not in ("sft", "reward"):
        yield (
            f"model.lora.path={lora.path}: {job} begins with a whole model. Merge the adapters "
            "into it with `python tools/convert_hf.py merge`, and remove the key."
        )
    yield from _base_problems(config, job)
    if job in WITHOUT_TRAINING or not lora.is_on:
        return
    if model.num_experts and (lacking := [n for n in lora.modules if n in FEED_FORWARD]):
        yield (
            f"model.lora.targets=[{','.join(lora.targets)}]: model.architecture="
            f"{model.architecture} has experts, which get no adapters, instead of "
            f"{', '.join(lacking)}. Use [{','.join(ATTENTION)}] or some of these."
        )
    if precision.fp8 != "off" and precision.fp8_param_gather:
        yield (
            f"model.lora.rank={lora.rank}: adapters are trained, and not gathered in FP8; "
            "precision.fp8_param_gather=true. Set that to false."
        )
    if model.router_aux_loss_coef:
        yield (
            f"model.router_aux_loss_coef={model.router_aux_loss_coef}: routers do not learn with "
            f"model.lora.rank={lora.rank}. Set it to 0."
        )


def _base_problems(config: Config, job: Job) -> Iterator[str]:
    """Rules for models that share the policy's frozen weights."""
    if job in WITHOUT_TRAINING:  # adapters are merged
        return
    critic, reward = config.critic.share_base, config.reward.share_base
    for section, shares in (("critic", critic), ("reward", reward)):
        if not shares or section not in read_sections(config, job):
            continue
        key = f"{section}.share_base=true"
        if job != "ppo":
            yield f"{key}: only ppo shares a base; this is {job}. Set it to false."
        elif not config.model.lora.is_on:
            yield (
                f"{key}: needs weights that stay as they are; model.lora.rank is not set, and "
                "all weights of the policy learn. Set it, or remove share_base."
            )
    if critic and job == "ppo" and not config.ppo.has_critic:
        yield (
            f"critic.share_base=true: ppo.estimator={config.ppo.estimator} has no critic. Set it "
            "to false."
        )
    if reward and job == "ppo":
        if not config.reward.models:
            yield "reward.share_base=true: reward.source names no reward model. Set it to false."
        for judge in config.reward.models:
            if judge.is_language:
                yield (
                    f"{judge.key}={judge.source}: is a language model, and only reward models "
                    "share the policy's base. Set reward.share_base=false, or leave it out."
                )


def _router_problems(config: Config, job: Job) -> Iterator[str]:
    """Megatron-Core weights the router's loss by tokens: it would dwarf a mean over few terms."""
    coefficient = config.model.router_aux_loss_coef
    pairs, responses = "is one over pairs", "is one over responses"
    mean = {"reward": pairs, "preference": pairs, "offline": responses}.get(job)
    if job == "ppo" and config.ppo.aggregation != "token_mean":
        mean = f"has ppo.aggregation={config.ppo.aggregation}"
    if coefficient and mean:
        yield (
            f"model.router_aux_loss_coef={coefficient}: needs a loss that is a mean over tokens; "
            f"that of {job} {mean}. Set it to 0."
        )


def _ppo_problems(config: Config) -> Iterator[str]:
    if not config.reward.source:
        yield (
            "reward.source: ppo needs a reward; it is not set. Give the directory of a reward "
            "model or a code reward module:function."
        )
    if config.rollout.temperature == 0:
        yield "rollout.temperature=0.0: ppo needs random samples. Use a value above 0, such as 1."
    size, kept = config.rollout.batch_size, config.rollout.trained_size
    if kept % config.ppo.minibatch_size:
        left = "" if kept == size else f", of which rollout.filter leaves {kept}"
        yield (
            f"ppo.minibatch_size={config.ppo.minibatch_size}: must divide rollout.batch_size="
            f"{size}{left}. Use {_divisors(kept)}."
        )


def _rollout_rank_problems(config: Config) -> Iterator[str]:
    """Rules for ranks that only generate."""
    rollout, ppo, precision = config.rollout, config.ppo, config.precision
    if rollout.staleness and not rollout.ranks:
        yield (
            f"rollout.staleness={rollout.staleness}: needs rollout.ranks > 0, for generation and "
            "training to overlap; it is 0. Set rollout.ranks, or rollout.staleness=0."
        )
    if rollout.staleness and ppo.old_logprobs == "trainer" and ppo.tis_cap is None:
        yield (
            f"rollout.staleness={rollout.staleness}: samples from older weights need the "
            "correction ppo.tis_cap; it is not set. Set it to 2, for example, or "
            "ppo.old_logprobs=sampler."
        )
    if rollout.ranks and precision.fp8 != "off" and precision.fp8_on_divergence == "leave":
        yield (
            "precision.fp8_on_divergence=leave: ranks that only generate would stay in FP8; "
            f"rollout.ranks={rollout.ranks}. Set it to warn, or rollout.ranks=0."
        )


def _offload_problems(config: Config, job: Job) -> Iterator[str]:
    for key in ("offload_idle", "offload_optimizer"):
        if not getattr(config.memory, key):
            continue
        if job in SECTIONS and job != "ppo":
            yield (
                f"memory.{key}=true: only ppo has phases with idle models; this is {job}. Set it "
                "to false."
            )
        if config.precision.fp8_param_gather:
            yield (
                f"memory.{key}=true: FP8 weights cannot be offloaded. Set it to false, or "
                "precision.fp8_param_gather=false."
            )


def _budget_problems(config: Config) -> Iterator[str]:
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    parallel, packs = config.parallel, config.ppo.packing
    multiple = context_multiple(parallel.context_size)
    if parallel.sequence_parallel and not packs:
        multiple *= parallel.tensor_size
    longest = round_up(longest, multiple)
    if config.ppo.microbatch_tokens is not None and config.ppo.microbatch_tokens < longest:
        yield (
            f"ppo.microbatch_tokens={config.ppo.microbatch_tokens}: must fit the longest "
            f"sequence, data.max_prompt_tokens + rollout.max_response_tokens = {longest}"
            f"{'' if packs and multiple == 1 else ' with padding'}. Use at least {longest}."
        )


def _offline_problems(config: Config) -> Iterator[str]:
    if not config.offline.needs_values:
        return
    why = (
        f"offline.algorithm={config.offline.algorithm} with offline.sampling="
        f"{config.offline.sampling} needs the values of prompts"
    )
    if not config.reward.source:
        yield (
            f"reward.source: {why}, which are learned from scored responses; it is not set. Give "
            "the directory of a reward model or a code reward module:function."
        )
    if config.data.validation_path is None:
        yield (
            f"data.validation_path: {why}, which are learned from responses to its prompts; it is "
            "not set. Give a file of prompts."
        )


def _divisors(number: int) -> str:
    found = [str(d) for d in range(1, min(number, 4096) + 1) if number % d == 0]
    return found[0] if len(found) == 1 else ", ".join(found[:-1]) + " or " + found[-1]
