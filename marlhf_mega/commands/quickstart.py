"""`marlhf quickstart`: SFT, reward model, macro PPO and a report, on built-in data."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlhf_mega.config.checks import Job, check_folder, check_sizes, check_world
from marlhf_mega.config.load import ConfigError, with_keys
from marlhf_mega.config.origin import find_origin
from marlhf_mega.config.schema import Config
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.train.inputs import check_machine, read_inputs
from marlhf_mega.train.summary import layout

if TYPE_CHECKING:
    from marlhf_mega.parallel.mesh import Mesh
    from marlhf_mega.resilience.watchdog import Watchdog

VOCABULARY = 512
ROWS = 4096
HELD_OUT = 512
"""Rows of each training and each held-out file."""
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
    "ppo": {"epochs": 2, "minibatch_size": 64, "microbatch_size": 32, "kl_coef": 0.4},
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
    """What the quickstart needs before it starts: it makes all its data itself."""

    config: Config


def quickstart_inputs(user: Config, world_size: int) -> QuickstartInputs:
    """Override the quickstart's own settings with the user's keys, and check the result.

    Raises:
        ConfigError: the user sets a section that the quickstart fills itself, or sizes do not fit.
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
    ours = SETTINGS | {"parallel": _layout(world_size)}
    if not user.ppo.has_critic:
        del ours["critic"]
    theirs = user.model_dump(exclude_unset=True)
    config = Config.model_validate(
        {name: ours.get(name, {}) | theirs.get(name, {}) for name in ours | theirs}
    )
    data_size = check_world(config, world_size)
    check_folder(config.run.dir, key="run.dir")
    for job in JOBS:  # now, not minutes later when each job starts
        check_sizes(_stage(config, job), job, data_size)
    check_machine(config, "ppo")
    if config.critic.init not in ("reward", "policy"):
        find_origin(Path(config.critic.init), key="critic.init")
    return QuickstartInputs(config)


def run_quickstart(inputs: QuickstartInputs, mesh: "Mesh", watchdog: "Watchdog") -> None:
    """Run the three jobs and show the results before and after PPO. All ranks call it."""
    from marlhf_mega.metrics.progress import show_before_after
    from marlhf_mega.parallel.collectives import barrier
    from marlhf_mega.report.page import report
    from marlhf_mega.train.ppo import run_ppo
    from marlhf_mega.train.reward import run_reward
    from marlhf_mega.train.sft import run_sft

    config, folder = inputs.config, inputs.config.run.dir
    if mesh.rank == 0:
        make_data(folder / "data", seed=config.run.seed)
    barrier()
    world = mesh.world_size
    run_sft(read_inputs(_stage(config, "sft"), "sft", world), mesh, watchdog)
    run_reward(read_inputs(_stage(config, "reward"), "reward", world), mesh, watchdog)
    before, after = run_ppo(read_inputs(_stage(config, "ppo"), "ppo", world), mesh, watchdog)
    if mesh.rank == 0:
        out = folder / "report.html"
        report([folder / job for job in JOBS], out)
        show_before_after(before, after, SHOWN, columns=("sft", "macro ppo"))
        sys.stdout.write(f"report: {out}\n")


def quickstart_summary(inputs: QuickstartInputs, world_size: int) -> str:
    """Return layout, rows, steps and tokens of the three jobs in one line."""
    config = inputs.config
    steps = " + ".join(str(config.run.steps or STEPS[job]) for job in JOBS)
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    return (
        f"ok: quickstart on {layout(config, 'ppo', world_size)}; {ROWS:,} rows, {HELD_OUT:,} held "
        f"out, for each of {', '.join(JOBS)}; {steps} steps; at most {longest:,} tokens each"
    )


SHOWN = ("eval/gold_mean", "eval/score_mean", "eval/kl", "eval/response_tokens")


def make_data(folder: Path, *, seed: int) -> None:
    """Write the built-in task's files and train its tokenizer; a seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, generate in (
        ("sft", toy.generate_sft),
        ("preferences", toy.generate_preferences),
        ("prompts", toy.generate_prompts),
    ):
        write_jsonl(folder / f"{name}.jsonl", generate(seed, ROWS))
        write_jsonl(folder / f"{name}_held_out.jsonl", generate(seed, HELD_OUT, held_out=True))
    train_tokenizer(toy.tokenizer_text(seed), folder / "tokenizer", vocab_size=VOCABULARY)


def _layout(world_size: int) -> dict[str, int]:
    """Choose TP2 x PP2 if the number of ranks allows it."""
    return {
        "tensor_size": 2 if world_size % 2 == 0 else 1,
        "pipeline_size": 2 if world_size % 4 == 0 else 1,
    }


def _stage(config: Config, job: Job) -> Config:
    """Derive the configuration of one of the three jobs."""
    folder = config.run.dir
    data = folder / "data"
    file = {"sft": "sft", "reward": "preferences", "ppo": "prompts"}[job]
    keys: dict[str, Any] = {
        "run.name": f"quickstart {job}",
        "run.dir": folder / job,
        "run.steps": config.run.steps or STEPS[job],
        "model.init": "random" if job == "sft" else str(folder / "sft"),
        "tokenizer.path": data / "tokenizer",
        "data.train_path": data / f"{file}.jsonl",
        "data.validation_path": data / f"{file}_held_out.jsonl",
    }
    if job == "sft":
        keys |= {"policy.lr": SFT_LR, "policy.lr_schedule": "cosine"}
        keys["model.lora"] = {}  # adapters would change little of weights that are random
    if job == "ppo":
        keys["reward.source"] = str(folder / "reward")
    else:  # only ppo has idle models
        keys |= {"memory.offload_idle": False, "memory.offload_optimizer": False}
    return with_keys(config, keys)
