"""Keys that were set and change nothing, because another key decides that nobody reads them."""

from collections.abc import Callable, Iterator
from typing import Any

from marlhf_mega.config.checks import READ_SECTIONS, Job, read_sections
from marlhf_mega.config.schema import Config

_NEEDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "macro.n": ("macro.rule", lambda rule: rule == "fixed_ngram"),
    "macro.lengths": ("macro.rule", lambda rule: rule == "random_ngram"),
    "macro.repeats": ("macro.rule", lambda rule: rule == "random_ngram"),
    "macro.random_mode": ("macro.rule", lambda rule: rule == "random_ngram"),
    "macro.perplexity": ("macro.rule", lambda rule: rule == "perplexity"),
    "macro.parser": ("macro.rule", lambda rule: rule == "parsing"),
    "macro.cutoff": ("macro.rule", lambda rule: rule == "parsing"),
    "macro.probability": ("macro.rule", lambda rule: rule == "probability"),
    "macro.probability_interval": ("macro.rule", lambda rule: rule == "probability"),
    "macro.entropy_share": ("macro.rule", lambda rule: rule == "entropy"),
    "macro.max_length": ("macro.rule", lambda rule: rule != "token"),
    "macro.value": ("macro.rule", lambda rule: rule != "token"),
    "macro.reward": ("macro.rule", lambda rule: rule != "token"),
    "macro.ratio": ("macro.rule", lambda rule: rule != "token"),
    "macro.discount": ("ppo.gamma", lambda gamma: gamma != 1),
    "macro.lambda_unit": ("ppo.gae_lambda", lambda decay: decay != 1),
    "ppo.vine_samples": ("ppo.estimator", lambda name: name == "vine"),
    "ppo.router_replay": ("model.num_experts", lambda count: count is not None),
    "ppo.kl_estimator": ("ppo.kl_coef", lambda coefficient: coefficient > 0),
    "ppo.kl_loss_estimator": ("ppo.kl_loss_coef", lambda coefficient: coefficient > 0),
    "ppo.kl_horizon": ("ppo.kl_target", lambda target: target is not None),
    "ppo.microbatch_size": ("ppo.microbatch_tokens", lambda tokens: tokens is None),
    "rollout.vllm": ("rollout.engine", lambda engine: engine == "vllm"),
    "rollout.filter_power": ("rollout.filter", lambda name: name == "pf_ppo"),
    "rollout.filter_tries": ("rollout.filter", lambda name: name == "dynamic"),
    "policy.min_lr": ("policy.lr_schedule", lambda schedule: schedule != "constant"),
    "critic.min_lr": ("critic.lr_schedule", lambda schedule: schedule != "constant"),
    "reward_model.min_lr": ("reward_model.lr_schedule", lambda schedule: schedule != "constant"),
    "reward.robust_weight": ("reward.combine", lambda rule: rule == "robust"),
    "reward.reference_field": (
        "reward.shaping",
        lambda names: not {"par", "center_reference"}.isdisjoint(names),
    ),
    "reward.par_scale": ("reward.shaping", lambda names: "par" in names),
    "reward.length_coef": ("reward.shaping", lambda names: "length_penalty" in names),
    "reward.length_limit": ("reward.shaping", lambda names: "length_penalty" in names),
    "reward.overlong_buffer": ("reward.shaping", lambda names: "overlong" in names),
    "reward.overlong_factor": ("reward.shaping", lambda names: "overlong" in names),
    "reward_model.overlap_coef": ("reward_model.length_coef", lambda coef: coef > 0),
    **{
        f"reward_model.latent_{name}": ("reward_model.latent_size", lambda size: size > 0)
        for name in ("context", "kl_coef", "kl_cycle")
    },
    "reward.missing_eos_penalty": ("reward.missing_eos", lambda rule: rule != "none"),
    "offline.kl_coef": ("offline.algorithm", lambda name: name == "a_lol_kl"),
    "offline.clip_range": (
        "offline.algorithm",
        lambda name: name in ("r_lol", "a_lol", "a_lol_seq", "a_lol_macro"),
    ),
    "precision.fp8_recipe": ("precision.fp8", lambda format: format != "off"),
    "precision.fp8_param_gather": ("precision.fp8", lambda format: format != "off"),
    "precision.fp8_edge_layers_bf16": ("precision.fp8", lambda format: format != "off"),
    "precision.fp8_frozen": ("precision.fp8", lambda format: format != "off"),
    "precision.fp8_max_logprob_gap": ("precision.fp8_check_interval", lambda steps: steps > 0),
    "precision.fp8_min_cosine": ("precision.fp8_check_interval", lambda steps: steps > 0),
    "precision.fp8_on_divergence": ("precision.fp8_check_interval", lambda steps: steps > 0),
    "evaluate.best_of_n": ("evaluate.samples_per_prompt", lambda samples: samples > 1),
    "evaluate.self_bleu": ("evaluate.samples_per_prompt", lambda samples: samples > 1),
    "logging.samples_interval": ("logging.samples", lambda samples: samples > 0),
    "checkpoint.keep_every": ("checkpoint.interval", lambda interval: interval > 0),
    "checkpoint.export_from_first": ("checkpoint.export_hf", lambda is_on: is_on),
}
"""Key -> the key that decides whether it is read, and for which of that one's values it is.

What is plainly wrong together is refused by `checks`; these may stand in a file that is used with
several settings.
"""


def unread_keys(config: Config, job: Job, optimizer_steps: dict[str, int]) -> list[str]:
    """Describe every key that is not at its default and has no effect in this job.

    Sections of other jobs may be in a file that several jobs share, and are not described.

    Args:
        config: of the run.
        job: which command runs.
        optimizer_steps: section of an optimizer -> its steps in the run, where they are known.
    """
    return [*_unread(config, job), *_unreached(config, optimizer_steps)]


def _unread(config: Config, job: Job) -> Iterator[str]:
    others = {section for sections in READ_SECTIONS.values() for section in sections}
    others -= set(read_sections(config, job))
    for key, (decides, is_read) in _NEEDS.items():
        section, name = key.split(".")
        value, other = _value(config, key), _value(config, decides)
        default = type(getattr(config, section)).model_fields[name].default
        if section not in others and value != default and not is_read(other):
            yield f"{key}={_text(value)} with {decides}={_text(other)}"

    if config.evaluate.against is not None and job != "evaluate":
        yield f"evaluate.against={config.evaluate.against} in {job}"


def _unreached(config: Config, optimizer_steps: dict[str, int]) -> Iterator[str]:
    for section, steps in optimizer_steps.items():
        settings = getattr(config, section)
        warmup = settings.num_warmup_steps(steps)
        if warmup >= steps > 0:
            yield (
                f"{section}.lr={settings.lr:g} with a warm-up of {warmup:,} steps, of "
                f"{steps:,} in the run"
            )


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _text(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
