"""`marlhf init`: a first configuration for a model and a data file, of a size that fits here."""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from marlhf_mega import platform
from marlhf_mega.config.checks import TrainingJob
from marlhf_mega.config.limits import round_up
from marlhf_mega.config.load import ConfigError, load_config, with_keys
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import ExampleBuilder
from marlhf_mega.data.files import Row, RowKind, read_objects, read_rows
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.plan.gpus import Gpu
from marlhf_mega.plan.plan import Cluster, Plan
from marlhf_mega.plan.report import verdict
from marlhf_mega.plan.search import search

_KINDS: dict[TrainingJob, RowKind] = {
    "sft": "sft",
    "reward": "preferences",
    "preference": "preferences",
    "ppo": "prompts",
    "offline": "offline",
}
_COMMENTS = {
    "run.name": "title in logs and in the report",
    "run.dir": "checkpoints, metrics, samples, the report and the exported model go here",
    "run.epochs": "passes over the training data; run.steps=N gives a number of steps instead",
    "model.hf_path": "the model to start from",
    "model.init": "the run to start from; a Hugging Face folder is model.hf_path instead",
    "parallel.tensor_size": "ranks that share every matrix",
    "parallel.pipeline_size": "stages that the layers are split into",
    "parallel.virtual_pipeline_size": "chunks of layers per stage",
    "parallel.context_size": "ranks that share every sequence",
    "parallel.sequence_parallel": "norms and residuals are split too",
    "memory.recompute": "full: less memory, a third more time",
    "memory.offload_idle": "models rest in host memory while they have nothing to do",
    "memory.offload_optimizer": "so does the optimizer outside of updates",
    "data.train_path": "a file, a pattern of files, hf://NAME:SPLIT, or a list of these",
    "data.max_prompt_tokens": "longest prompt",
    "data.max_response_tokens": "longest response, its end token included",
    "data.long_prompts": "longer prompts lose their beginning; drop leaves them out",
    "policy.lr": "peak learning rate; the first value to tune",
    "policy.lr_schedule": "shape after the warm-up",
    "policy.warmup_steps": "steps of linear warm-up",
    "critic.lr": "of the value model, usually higher than the policy's",
    "critic.warmup_steps": "steps of linear warm-up",
    "sft.batch_size": "sequences per optimizer step, over all ranks",
    "sft.microbatch_size": "sequences per forward on one rank: memory, not results",
    "reward_model.lr": "peak learning rate",
    "reward_model.lr_schedule": "shape after the warm-up",
    "reward_model.warmup_steps": "steps of linear warm-up",
    "reward_model.batch_size": "pairs per optimizer step, over all ranks",
    "reward_model.microbatch_size": "pairs per forward on one rank: memory, not results",
    "reward_model.center_coef": "keeps scores near zero",
    "preference.batch_size": "pairs per optimizer step, over all ranks",
    "preference.microbatch_size": "pairs per forward on one rank: memory, not results",
    "rollout.batch_size": "responses per PPO step, over all ranks",
    "rollout.max_response_tokens": "longest response that is generated",
    "ppo.minibatch_size": "responses per optimizer step",
    "ppo.microbatch_size": "sequences per forward on one rank: memory, not results",
    "ppo.kl_coef": "price of leaving the starting model; higher stays closer",
    "macro.rule": "where an action ends; token is ordinary PPO",
    "macro.n": "fixed_ngram: tokens per action",
    "reward.source": "a run, a Hugging Face folder, a function module:function, or a server",
    "reward.missing_eos": "a response that does not end loses some of its score",
    "offline.batch_size": "responses per optimizer step, over all ranks",
    "offline.microbatch_size": "sequences per forward on one rank: memory, not results",
    "evaluate.interval": "steps between evaluations on data.validation_path, if it is set",
    "checkpoint.interval": "steps between checkpoints, from which a killed run goes on",
}
_MICROBATCH = {
    "sft": "sft.microbatch_size",
    "reward": "reward_model.microbatch_size",
    "preference": "preference.microbatch_size",
    "ppo": "ppo.microbatch_size",
    "offline": "offline.microbatch_size",
}


def run_init(
    folder: Path, data: str, *, job: TrainingJob | None = None, output: Path | None = None
) -> int:
    """Write the configuration and say how to start it.

    Args:
        folder: a Hugging Face model folder.
        data: training data, as `data.train_path`.
        job: None means the one that the fields of the data suit.
        output: a new file; None means `JOB.yaml`.

    Raises:
        ValueError: the model or the data cannot be used, the model does not fit this machine, or
            the file is there.
    """
    job = job or _job_for(data)
    target = output or Path(f"{job}.yaml")
    if target.exists():
        raise ConfigError(
            f"--output={target}: must be a new file; there is one. Remove it, or give another name."
        )
    values, plan = fitting_values(job, folder, data, here())
    found = f"{plan.cluster.gpus_per_node} x {plan.cluster.gpu.name}: {verdict(plan, None)}"
    about = [f"{job} of {folder} on {data}.", f"Plan for {found}."]
    target.write_text(render(values, about), encoding="utf-8")
    ranks = plan.cluster.world_size
    start = "marlhf" if ranks == 1 else f"bash launch/torchrun.sh --ranks-per-node {ranks}"
    sys.stdout.write(f"wrote {target}, for {found}\n{start} {job} --config {target}\n")
    return 0


def shipped(job: TrainingJob) -> str:
    """Return configs/hf_small_JOB.yaml."""
    needed = {"sft": "model.hf_path=HF_DIR data.train_path=demos.jsonl"}
    rows = {"reward": "pairs", "preference": "pairs", "ppo": "prompts", "offline": "answers"}
    more = needed.get(job) or f"data.train_path={rows[job]}.jsonl"
    if job == "offline":
        more += " data.validation_path=prompts.jsonl"
    about = [
        f"A first {job} run of a model of up to a few billion parameters, on one rank or one GPU:",
        f"marlhf {job} --config configs/hf_small_{job}.yaml {more}",
    ]
    return render(starting_values(job), about)


def here() -> Cluster:
    """Return this machine: its GPUs, or one rank on its CPUs."""
    device = platform.current()
    # Speed only ranks layouts that fit, so that of a typical GPU serves.
    gpu = Gpu(
        name=device.device_name,
        memory=device.total_memory,
        flops=312e12,
        bandwidth=2e12,
        link=300e9,
        has_fp8=False,
    )
    return Cluster(nodes=1, gpus_per_node=device.num_devices, gpu=gpu, has_engine=False)


def fitting_values(
    job: TrainingJob, folder: Path, data: str, cluster: Cluster
) -> tuple[dict[str, Any], Plan]:
    """Return the keys of a run that fits, and its plan.

    Raises:
        ValueError: the model or the data cannot be used, or no layout fits.
    """
    values = starting_values(job) | {"model.hf_path": str(folder), "data.train_path": data}
    values.pop("model.init", None)
    config = load_config(None, [f"model.hf_path={folder}"])
    values |= _lengths(job, folder, data, config.model.max_positions)
    planned = "ppo" if job == "offline" else job  # which needs as much, and more to generate
    dtype = {"precision.dtype": "float32"} if cluster.gpu.name == "cpu" else {}
    found = search(with_keys(config, _values_for_plan(values, planned) | dtype), planned, cluster)
    if not found:
        gpus = f"{cluster.gpus_per_node} x {cluster.gpu.name}"
        raise ConfigError(
            f"--hf-path={folder}: must be a model that {job} can train on {gpus}; no layout fits. "
            "Find machines for it with marlhf plan --search."
        )
    keys, plan = min(found, key=lambda pair: _complexity(pair[0], _MICROBATCH[planned]))
    keys[_MICROBATCH[job]] = keys.pop(_MICROBATCH[planned])
    defaults = Config().model_dump()
    for key, value in keys.items():
        section, name = key.split(".")
        if value != defaults[section][name] or key == _MICROBATCH[job]:
            values[key] = value
    return values, plan


def _complexity(keys: Mapping[str, Any], microbatch: str) -> tuple[Any, ...]:
    """Order layouts: first those that give up no speed for memory, on few ranks per replica."""
    sizes = [keys[f"parallel.{name}_size"] for name in ("tensor", "pipeline", "context")]
    return (
        "memory.offload_idle" in keys,
        keys["memory.recompute"] == "full",
        math.prod(sizes),
        keys["parallel.virtual_pipeline_size"],
        abs(keys[microbatch] - 8),
    )


def starting_values(job: TrainingJob) -> dict[str, Any]:
    """Return the keys of a first run of a model of up to a few billion parameters."""
    values: dict[str, Any] = {"run.name": job, "run.dir": f"runs/my/{job}"}
    match job:
        case "sft":
            values |= {
                "run.epochs": 3,
                "data.max_response_tokens": 256,
                "policy.lr": 2e-5,
                "policy.lr_schedule": "cosine",
                "policy.warmup_steps": 10,
                "sft.batch_size": 32,
                "sft.microbatch_size": 4,
            }
        case "reward":
            values |= {
                "model.init": "runs/my/sft",
                "data.max_response_tokens": 256,
                "reward_model.lr_schedule": "cosine",
                "reward_model.warmup_steps": 10,
                "reward_model.batch_size": 32,
                "reward_model.microbatch_size": 4,
                "reward_model.center_coef": 0.01,
            }
        case "preference":
            values |= {
                "model.init": "runs/my/sft",
                "data.max_response_tokens": 256,
                "policy.lr": 5e-7,
                "policy.lr_schedule": "linear",
                "policy.warmup_steps": 10,
                "preference.batch_size": 32,
                "preference.microbatch_size": 4,
            }
        case "ppo":
            values |= {
                "model.init": "runs/my/sft",
                "policy.lr": 2e-6,
                "policy.warmup_steps": 5,
                "critic.warmup_steps": 5,
                "rollout.batch_size": 32,
                "rollout.max_response_tokens": 256,
                "ppo.minibatch_size": 32,
                "ppo.microbatch_size": 4,
                "reward.source": "runs/my/reward",
                "reward.missing_eos": "subtract",
            }
        case "offline":
            values |= {
                "model.init": "runs/my/sft",
                "data.max_response_tokens": 256,
                "policy.warmup_steps": 10,
                "critic.warmup_steps": 5,
                "rollout.max_response_tokens": 256,
                "reward.source": "runs/my/reward",
                "offline.batch_size": 32,
                "offline.microbatch_size": 4,
            }
    return values | {"evaluate.interval": 50, "checkpoint.interval": 50}


def render(values: Mapping[str, Any], about: Sequence[str]) -> str:
    """Return dotted keys as YAML, section by section, each with what it is for."""
    lines = [f"# {line}" for line in about]
    for section in Config.model_fields:
        fields = type(getattr(Config(), section)).model_fields
        own = {key: values[key] for name in fields if (key := f"{section}.{name}") in values}
        if not own:
            continue
        lines.append(f"{section}:")
        entries = [f"  {key.partition('.')[2]}: {_yaml(value)}" for key, value in own.items()]
        width = min(40, max(map(len, entries)))
        comments = map(_COMMENTS.__getitem__, own)
        lines += [f"{e:<{width}}  # {c}" for e, c in zip(entries, comments, strict=True)]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    is_plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z./][\w./-]*", value)
    return str(value) if is_plain else json.dumps(value)


def _job_for(data: str) -> TrainingJob:
    """Return the job that the fields of the first row suit."""
    fields = {name for _, row in islice(read_objects(_files(data)[0]), 1) for name in row}
    if {"chosen", "rejected"} <= fields:
        return "reward"
    if "reward" in fields:
        return "offline"
    return "sft" if {"response", "messages"} & fields else "ppo"


def _files(data: str) -> list[str]:
    config = with_keys(Config(), {"data.train_path": data})
    assert config.data.train_path is not None
    return [file for source in config.data.train_path for file in source.files()]


def _lengths(job: TrainingJob, folder: Path, data: str, positions: int) -> dict[str, Any]:
    """Return keys that hold the longest prompt and response, as far as the model's positions go."""
    builder = ExampleBuilder(
        tokenizer=Tokenizer.load(folder, key="--hf-path"),
        max_prompt_tokens=1 << 30,
        max_response_tokens=1 << 30,
        long_prompts="error",
        source=data,
    )
    rows: list[Row] = [row for file in _files(data) for row in read_rows(file, _KINDS[job])]
    prompt, response = 1, 1
    match job:
        case "sft":
            for sft in builder.supervised(rows):
                prompt = max(prompt, len(sft.prompt_ids))
                response = max(response, len(sft.response_ids))
        case "reward" | "preference":
            for pair in builder.preferences(rows):
                prompt = max(prompt, len(pair.prompt_ids))
                response = max(response, len(pair.chosen_ids), len(pair.rejected_ids))
        case "offline":
            for scored in builder.offline(rows):
                prompt = max(prompt, len(scored.prompt_ids))
                response = max(response, len(scored.response_ids))
        case "ppo":
            prompt, response = max(len(p.prompt_ids) for p in builder.prompts(rows)), 256
    most = min(round_up(prompt, 8), positions * 3 // 4)
    keys: dict[str, Any] = {"data.max_prompt_tokens": most}
    if prompt > most:
        keys["data.long_prompts"] = "truncate"
    limit = min(round_up(response, 8), positions - most)
    if job != "ppo":
        keys["data.max_response_tokens"] = limit
    if job in ("ppo", "offline"):
        keys["rollout.max_response_tokens"] = limit
    return keys


def _values_for_plan(values: Mapping[str, Any], planned: str) -> dict[str, Any]:
    """Return the keys that decide memory."""
    kept = {
        key: value
        for key, value in values.items()
        if key.endswith(("batch_size", "minibatch_size", "_tokens")) or key == "reward.source"
    }
    if planned == "ppo":
        kept.setdefault("rollout.batch_size", 32)
        kept.setdefault("ppo.minibatch_size", 32)
    return kept
