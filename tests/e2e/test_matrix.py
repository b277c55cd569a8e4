"""Every value of every key that chooses a method trains for two steps, in one process."""

from typing import Literal, get_args, get_origin

import pytest
import torch.distributed as dist

from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.training import OptimizerConfig
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.jobs import prepare_job
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.resilience.watchdog import Watchdog
from tests.e2e.reported import assert_reported
from tests.e2e.test_ppo_rules import METHODS, REWARDS, RULES
from tests.e2e.test_preference import LOSSES
from tests.vllm.installed import needs_vllm

SAFE = {"chosen_safe": True, "rejected_safe": False, "from_reference": "rejected", "margin": 1.0}
SAFE |= {"user": "x"}
# Job, sections, and the metrics of the job's screen that the run does not have. What
# `test_ppo_rules.py` and `test_preference.py` train with is not repeated.
SETTINGS = {
    "running": (
        "ppo",
        {
            "macro": {"rule": "random_ngram", "random_mode": "list", "value": "position_repo"},
            "ppo": {"aggregation": "macro_mean", "kl_estimator": "k2"},
            "reward": {"normalize": "running", "missing_eos": "subtract"},
        },
        (),
    ),
    "running scale": (
        "ppo",
        {
            "macro": {"rule": "perplexity", "perplexity": "token", "discount": "per_token"},
            "ppo": {
                "gamma": 0.99,
                "aggregation": "seq_mean_token_mean",
                "kl_estimator": "k3",
                "sampler_mask": "token",
            },
            "reward": {"normalize": "running_scale", "missing_eos": "replace"},
        },
        (),
    ),
    "released": (
        "ppo",
        {
            "macro": {"rule": "perplexity", "perplexity": "prefix", "compat": "ma_rlhf"},
            "ppo": {
                "kl_estimator": "abs",
                "sampler_mask": "macro",
                "kl_loss_coef": 0.1,
                "kl_loss_estimator": "k3_straight_through",
            },
        },
        (),
    ),
    "sampler": ("ppo", {"ppo": {"old_logprobs": "sampler"}}, ("policy/entropy",)),
    "vllm": (
        "ppo",
        {
            "model": {"head_dim": 32},
            "rollout": {"engine": "vllm", "top_k": 8, "vllm": {"enforce_eager": True}},
        },
        (),
    ),
    "no penalty": ("ppo", {"ppo": {"kl_coef": 0.0}}, ("policy/kl",)),
    **{
        name: ("ppo", {"rollout": {"filter": name, "samples_per_prompt": samples}, "ppo": ppo}, ())
        for name, samples, ppo in (
            ("pf_ppo", 1, {}),
            ("best_worst", 4, {}),
            ("best_random", 4, {}),
            ("best_of_n", 4, {"minibatch_size": 2}),
            ("dynamic", 4, {}),
        )
    },
    "nlpo": (
        "ppo",
        {"rollout": {"top_p": 0.9, "mask_interval": 2, "mask_min_tokens": 9}},
        (),
    ),
    "last": ("reward", {"reward_model": {"loss": "last"}}, ()),
    "span": ("reward", {"reward_model": {"loss": "span"}}, ()),
    "latents": ("reward", {"reward_model": {"latent_size": 8, "latent_kl_cycle": 2}}, ()),
    **{
        name: ("offline", {"offline": settings}, () if has_reference else ("offline/kl",))
        for name, settings, has_reference in (
            ("nll", {"algorithm": "nll", "sampling": "all"}, False),
            ("wbc", {"algorithm": "wbc", "sampling": "good_random"}, False),
            ("r_gold", {"algorithm": "r_gold"}, False),
            ("r_lol", {"algorithm": "r_lol"}, True),
            ("a_lol", {"algorithm": "a_lol", "sampling": "all_priority"}, True),
            ("a_lol_seq", {"algorithm": "a_lol_seq"}, True),
            ("a_lol_macro", {"algorithm": "a_lol_macro"}, True),
            (
                "a_lol_ref_free",
                {"algorithm": "a_lol_ref_free", "sampling": "all", "compat": "lol_rl"},
                False,
            ),
            ("a_lol_kl", {"algorithm": "a_lol_kl", "kl_coef": 0.1}, True),
        )
    },
    **{
        settings["loss"]: ("preference", {"preference": settings}, ())
        for settings in (
            {"loss": "dpo", "margin": "offset"},
            {"loss": "ipo", "margin": "weight"},
            {"loss": "cpl", "gamma": 0.9},
            {"loss": "xpo"},
            {"loss": "refuel"},
            {"loss": "bfpo"},
            {"loss": "nash_md", "mixture": 0.5},
            {"loss": "ipo_md"},
        )
    },
}
# Sections that say where and how, not what is learned.
OTHER_SECTIONS = {"run", "model", "parallel", "precision", "memory", "tokenizer", "data"}
OTHER_SECTIONS |= {"policy", "critic", "sft", "evaluate", "checkpoint", "watchdog", "logging"}


def choices(annotation):
    """The values of the literals in an annotation, numbers and switches apart."""
    if get_origin(annotation) is Literal:
        return {value for value in get_args(annotation) if isinstance(value, str)}
    return set().union(*map(choices, get_args(annotation)))


def tried(section, key):
    """The values of a key, or the names in its lists, in all runs of the tables and of this one."""
    runs = [{"macro": {"rule": rule, **keys}} for rule, keys in RULES.items()]
    for ppo, macro, samples in METHODS.values():
        runs.append({"ppo": ppo, "macro": macro, "rollout": {"samples_per_prompt": samples}})
    runs += [{"reward": reward, "ppo": ppo} for reward, ppo in REWARDS.values()]
    runs += [{"preference": {"loss": loss, **keys}} for loss, keys in LOSSES.items()]
    runs += [sections for _, sections, _ in SETTINGS.values()]
    rollout = {"batch_size": 8}
    configs = [
        Config.model_validate(run | {"rollout": rollout | run.get("rollout", {})}) for run in runs
    ]
    found = [getattr(getattr(config, section), key) for config in configs]
    return {name for value in found for name in (value if isinstance(value, tuple) else [value])}


CHOICES = [
    (section, key, values)
    for section, field in Config.model_fields.items()
    if section not in OTHER_SECTIONS
    for key, keys in field.annotation.model_fields.items()
    if key not in OptimizerConfig.model_fields and (values := choices(keys.annotation))
]


@pytest.mark.parametrize(("section", "key", "values"), CHOICES)
def test_every_value_of_a_choice_is_tried(section, key, values):
    assert values - tried(section, key) == set()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    prompts = toy.generate_prompts(0, 16)
    write_jsonl(folder / "prompts.jsonl", prompts)
    answers = {"response": "sun", "chosen": "sun", "rejected": "moon"}
    rewards = {"reward": 50.0, "chosen_reward": 50.0, "rejected_reward": 50.0}
    write_jsonl(folder / "answers.jsonl", [row | answers | rewards | SAFE for row in prompts])
    (folder / "varied.py").write_text(
        "def reward(prompt, response):\n    return float(sum(map(ord, response)) % 7)\n"
    )
    return folder


@pytest.fixture(scope="module")
def mesh():
    joined = create_mesh(Config().parallel)
    yield joined
    destroy_mesh(leave_world=False)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[needs_vllm] if n == "vllm" else []) for n in SETTINGS]
)
def test_every_choice_trains(files, mesh, tmp_path, monkeypatch, name):
    monkeypatch.syspath_prepend(str(files))
    job, sections, without = SETTINGS[name]
    needs_answers = job != "ppo" and name not in ("nash_md", "ipo_md")
    base = {
        "run": {"dir": tmp_path, "steps": 2},
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "init_std": 0.2},
        "tokenizer": {"path": files / "tok"},
        "data": {
            "train_path": files / ("answers.jsonl" if needs_answers else "prompts.jsonl"),
            "max_prompt_tokens": 64,
        },
        "rollout": {"batch_size": 8, "max_response_tokens": 12},
        "ppo": {"minibatch_size": 4, "microbatch_size": 2},
        "offline": {"batch_size": 4, "value_epochs": 1},
        "reward_model": {"batch_size": 4},
        "preference": {"batch_size": 4},
        "reward": {"source": "varied:reward"},
        "checkpoint": {"export_hf": False},
        "logging": {"tensorboard": False},
    }
    if job == "offline":
        base["data"]["validation_path"] = files / "prompts.jsonl"
        base["evaluate"] = {"num_prompts": 2}
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    prepared = prepare_job(job, Config.model_validate(base), world_size=1)
    with Watchdog(prepared.config, mesh) as watchdog:
        prepared.work(mesh, watchdog)
    assert_reported(tmp_path, job, without=without)
