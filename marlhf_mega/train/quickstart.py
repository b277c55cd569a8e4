"""The whole story on this machine with built-in data: sft, reward model, macro ppo, report."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlhf_mega.config.checks import Job, check_folder, check_sizes, check_world
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.origin import find_origin
from marlhf_mega.config.schema import Config
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.metrics.progress import show_before_after
from marlhf_mega.metrics.report import report
from marlhf_mega.parallel.collectives import barrier
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.train.inputs import check_machine
from marlhf_mega.train.ppo import ppo_inputs, run_ppo
from marlhf_mega.train.reward import reward_inputs, run_reward
from marlhf_mega.train.sft import run_sft, sft_inputs

VOCABULARY = 512
ROWS = {"sft": 4096, "preferences": 4096, "prompts": 4096}
HELD_OUT = 512
JOBS: tuple[Job, ...] = ("sft", "reward", "ppo")
STEPS = {"sft": 300, "reward": 300, "ppo": 40}
SFT_LR = 2e-3
SETTINGS: dict[str, Any] = {
    "run": {"name": "quickstart", "dir": "runs/quickstart"},
    "model": {
        "num_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 352,
        "max_positions": 96,
    },
    "data": {"max_prompt_tokens": 40, "max_response_tokens": 56},
    "policy": {"lr": 3e-4},
    "critic": {"lr": 1e-3},
    "sft": {"batch_size": 64, "microbatch_size": 32},
    "reward_model": {"lr": 5e-4, "batch_size": 64, "microbatch_size": 32},
    "rollout": {"batch_size": 128, "max_response_tokens": 56},
    "macro": {"rule": "fixed_ngram", "n": 5},
    "ppo": {"epochs": 2, "minibatch_size": 64, "microbatch_size": 32, "kl_coef": 0.1},
    "evaluate": {
        "num_prompts": 512,
        "batch_size": 256,
        "gold": "marlhf_mega.data.toy:gold_reward",
    },
    "checkpoint": {"keep": 1},
}
"""Sizes that a laptop trains in minutes."""


@dataclass(frozen=True)
class QuickstartInputs:
    """Everything else is made on the way."""

    config: Config


def quickstart_inputs(user: Config, world_size: int) -> QuickstartInputs:
    """Put the user's keys over the quickstart's own settings.

    Raises:
        ConfigError: a key that the quickstart decides itself is set, or something does not fit.
    """
    for section in ("tokenizer", "data", "reward"):
        if section in user.model_fields_set:
            raise ConfigError(
                f"{section}: quickstart makes its own data and trains its own reward model. "
                "Remove the section, or run sft, reward and ppo with a config of your own."
            )
    if user.rollout.ranks:
        raise ConfigError(
            f"rollout.ranks={user.rollout.ranks}: quickstart runs all its jobs on the same ranks. "
            "Leave it out, or run sft, reward and ppo with a config of your own."
        )
    settings = _over(
        SETTINGS | {"parallel": _layout(world_size)}, user.model_dump(exclude_unset=True)
    )
    config = Config.model_validate(settings)
    data_size = check_world(config, world_size)
    check_folder(config.run.dir, key="run.dir")
    # Not when their turn comes, minutes later.
    for job in JOBS:
        check_sizes(_stage(config, job), job, data_size)
    check_machine(config, "ppo")
    if config.critic.init not in ("reward", "policy"):
        find_origin(Path(config.critic.init), key="critic.init")
    return QuickstartInputs(config)


def run_quickstart(inputs: QuickstartInputs, mesh: Mesh) -> None:
    """Run the three jobs one after the other and show what changed. All ranks call it."""
    config, folder = inputs.config, inputs.config.run.dir
    if mesh.rank == 0:
        make_data(folder / "data", seed=config.run.seed)
    barrier()
    world = mesh.world_size
    run_sft(sft_inputs(_stage(config, "sft"), world), mesh)
    run_reward(reward_inputs(_stage(config, "reward"), world), mesh)
    ppo = _stage(config, "ppo")
    before, after = run_ppo(ppo_inputs(ppo, world), mesh)
    if mesh.rank == 0:
        out = folder / "report.html"
        report([folder / job for job in JOBS], out)
        show_before_after(
            [(label, before.get(name), after.get(name)) for label, name in SHOWN],
            columns=("sft", "macro ppo"),
        )
        sys.stdout.write(f"report: {out}\n")


SHOWN = (
    ("gold reward", "eval/gold_mean"),
    ("  standard error", "eval/gold_stderr"),
    ("reward model score", "eval/score_mean"),
    ("KL from sft", "eval/kl"),
    ("response tokens", "eval/response_tokens"),
)


def make_data(folder: Path, *, seed: int) -> None:
    """Write the built-in task's files and train its tokenizer; the same bytes for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "sft.jsonl", toy.generate_sft(seed, ROWS["sft"]))
    write_jsonl(folder / "preferences.jsonl", toy.generate_preferences(seed, ROWS["preferences"]))
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(seed, ROWS["prompts"]))
    held_out = {
        "sft": toy.generate_sft(seed, HELD_OUT, held_out=True),
        "preferences": toy.generate_preferences(seed, HELD_OUT, held_out=True),
        "prompts": toy.generate_prompts(seed, HELD_OUT, held_out=True),
    }
    for name, rows in held_out.items():
        write_jsonl(folder / f"{name}_held_out.jsonl", rows)
    train_tokenizer(toy.tokenizer_text(seed), folder / "tokenizer", vocab_size=VOCABULARY)


def _layout(world_size: int) -> dict[str, int]:
    """Choose TP2 x PP2 where there are ranks for it."""
    return {
        "tensor_size": 2 if world_size % 2 == 0 else 1,
        "pipeline_size": 2 if world_size % 4 == 0 else 1,
    }


def _stage(config: Config, job: Job) -> Config:
    """Derive one job's configuration."""
    folder = config.run.dir
    data = folder / "data"
    file = {"sft": "sft", "reward": "preferences", "ppo": "prompts"}[job]
    changes: dict[str, Any] = {
        "run": {
            "name": f"quickstart {job}",
            "dir": folder / job,
            "steps": config.run.steps or STEPS[job],
        },
        "model": {"init": "random" if job == "sft" else str(folder / "sft")},
        "tokenizer": {"path": data / "tokenizer"},
        "data": {
            "train_path": data / f"{file}.jsonl",
            "validation_path": data / f"{file}_held_out.jsonl",
        },
    }
    if job == "sft":
        changes["policy"] = {"lr": SFT_LR, "lr_schedule": "cosine"}
    if job == "ppo":
        changes["reward"] = {"source": str(folder / "reward")}
    else:
        # Only ppo has models that rest.
        changes["memory"] = {"offload_idle": False, "offload_optimizer": False}
    return Config.model_validate(_over(config.model_dump(), changes))


def _over(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested keys; `changes` wins."""
    merged = dict(base)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _over(merged[name], value) if both else value
    return merged
