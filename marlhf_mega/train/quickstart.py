"""The whole story on this machine with built-in data: sft -> reward model -> macro ppo -> report."""

import logging
import sys
from pathlib import Path

from marlhf_mega.config.checks import check_world
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import (
    CheckpointConfig,
    Config,
    CriticConfig,
    DataConfig,
    EvaluateConfig,
    MacroConfig,
    OptimizerConfig,
    ParallelConfig,
    PPOConfig,
    RewardConfig,
    RewardModelConfig,
    RewardTerm,
    RolloutConfig,
    RunConfig,
    SftConfig,
    TokenizerConfig,
)
from marlhf_mega.config.section import Section
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.metrics.progress import show_before_after
from marlhf_mega.parallel.collectives import barrier
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.train.ppo import ppo_inputs, run_ppo
from marlhf_mega.train.reward import reward_inputs, run_reward
from marlhf_mega.train.sft import run_sft, sft_inputs

logger = logging.getLogger(__name__)

GOLD = "marlhf_mega.data.toy:gold_reward"
VOCABULARY = 384
ROWS = {"sft": 4096, "preferences": 4096, "prompts": 4096}
HELD_OUT = 512


def quickstart_config(user: Config, world_size: int) -> Config:
    """Put the user's keys over the quickstart's own settings.

    Raises:
        ConfigError: a key that the quickstart decides itself is set, or the layout does not fit.
    """
    for section in ("tokenizer", "data", "reward"):
        if section in user.model_fields_set:
            raise ConfigError(
                f"{section}: quickstart makes its own data and trains its own reward model. "
                "Remove the section, or run sft, reward and ppo with a config of your own."
            )
    merged = {
        name: _over(getattr(_settings(world_size), name), getattr(user, name))
        for name in Config.model_fields
    }
    config = Config.model_construct(**merged)
    check_world(config, world_size)
    return config


def run_quickstart(config: Config, mesh: Mesh) -> None:
    """Run the three jobs one after the other and show what changed. All ranks call it."""
    folder = config.run.dir
    if mesh.rank == 0:
        make_data(folder / "data", seed=config.run.seed)
    barrier()
    world = mesh.world_size
    run_sft(sft_inputs(_stage(config, "sft"), world), mesh)
    run_reward(reward_inputs(_stage(config, "reward"), world), mesh)
    ppo = _stage(config, "ppo")
    before, after = run_ppo(ppo_inputs(ppo, world), mesh)
    if mesh.rank == 0:
        from marlhf_mega.metrics.report import report

        out = folder / "report.html"
        report([folder / "sft", folder / "reward", folder / "ppo"], out)
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


def _settings(world_size: int) -> Config:
    """Sizes that a laptop trains in minutes; TP2 x PP2 where there are ranks for it."""
    tensor = 2 if world_size % 2 == 0 else 1
    pipeline = 2 if world_size % 4 == 0 else 1
    return Config(
        run=RunConfig(name="quickstart", dir=Path("runs/quickstart")),
        model=ModelConfig(
            num_layers=2,
            hidden_size=128,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=352,
            max_positions=128,
        ),
        parallel=ParallelConfig(tensor_size=tensor, pipeline_size=pipeline),
        data=DataConfig(max_prompt_tokens=64, max_response_tokens=64),
        policy=OptimizerConfig(lr=3e-4),
        critic=CriticConfig(lr=1e-3),
        sft=SftConfig(batch_size=64, microbatch_size=32),
        reward_model=RewardModelConfig(lr=1e-3, batch_size=64, microbatch_size=32),
        rollout=RolloutConfig(batch_size=128, max_response_tokens=64),
        macro=MacroConfig(rule="fixed_ngram", n=5),
        ppo=PPOConfig(epochs=2, minibatch_size=64, microbatch_size=32, kl_coef=0.02),
        evaluate=EvaluateConfig(num_prompts=512, batch_size=256, gold=GOLD),
        checkpoint=CheckpointConfig(keep=1),
    )


STEPS = {"sft": 300, "reward": 200, "ppo": 60}
SFT_LR = 2e-3


def _stage(config: Config, job: str) -> Config:
    """Derive one job's configuration."""
    folder = config.run.dir
    data = folder / "data"
    file = {"sft": "sft", "reward": "preferences", "ppo": "prompts"}[job]
    init = "random" if job == "sft" else str(folder / "sft")
    steps = {"run": config.run.model_copy(
        update={
            "name": f"quickstart {job}",
            "dir": folder / job,
            "steps": config.run.steps or STEPS[job],
        }
    )}
    policy = config.policy
    if job == "sft":
        policy = policy.model_copy(update={"lr": SFT_LR, "lr_schedule": "cosine"})
    reward = RewardConfig()
    if job == "ppo":
        reward = RewardConfig(source=(RewardTerm(source=str(folder / "reward")),))
    return config.model_copy(
        update={
            **steps,
            "model": config.model.model_copy(update={"init": init}),
            "policy": policy,
            "tokenizer": TokenizerConfig(path=data / "tokenizer"),
            "data": config.data.model_copy(
                update={
                    "train_path": data / f"{file}.jsonl",
                    "validation_path": data / f"{file}_held_out.jsonl",
                }
            ),
            "reward": reward,
        }
    )


def _over(base: Section, user: Section) -> Section:
    """Return `base` with the keys that the user has set."""
    return base.model_copy(update={name: getattr(user, name) for name in user.model_fields_set})
