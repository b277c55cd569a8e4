"""Which keys go together: what an estimator, an objective, a rule or a loss reads and needs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from marlhf_mega.config.schema import Config

_OF_THE_CRITIC = (
    "ppo.gae_lambda",
    "ppo.gae_lambda_critic",
    "ppo.gae_lambda_alpha",
    "ppo.value_clip_range",
    "ppo.critic_only_steps",
    "macro.value_target",
    "macro.lambda_unit",
)
_OF_MACRO_STEPS = ("macro.reward", "macro.value", "macro.discount", "ppo.gamma")
_OF_CLIPPING = ("ppo.clip_range", "ppo.clip_range_high", "ppo.dual_clip", "macro.ratio")
_UNREAD_BY_OBJECTIVE = {
    "clip": (),
    "cispo": ("ppo.dual_clip",),
    "pg": _OF_CLIPPING,
    "p3o": _OF_CLIPPING[1:],
}
_NEEDED_BY_P3O = {
    "ppo.estimator": "dr_grpo",
    "ppo.aggregation": "seq_mean_token_sum",
    "ppo.whiten_advantages": False,
    "ppo.kl_estimator": "k1",
    "ppo.kl_target": None,
    "ppo.microbatch_tokens": None,
    "ppo.tis_cap": None,
    "ppo.sampler_mask": None,
    "ppo.likely_mask": None,
    "rollout.samples_per_prompt": 2,
}

_NEEDED_BY_BRAIN = {
    "ppo.objective": "pg",
    "ppo.aggregation": "seq_mean_token_sum",
    "ppo.whiten_advantages": False,
    "ppo.kl_estimator": "k1",
    "ppo.kl_target": None,
    "rollout.top_k": 0,
    "rollout.top_p": 1.0,
}
_SHAPES_SCORES = ("constraints", "dense", "shaping", "clip", "normalize", "missing_eos")
_OF_GIVEN_PAIRS = ("label_smoothing", "nll_coef", "margin", "reference", "reference_dir")
_UNREAD_BY_LOSS = {
    "dpo": (),
    "ipo": ("label_smoothing",),
    "pro": ("beta", "label_smoothing", "length_normalize", "reference", "reference_dir", "margin"),
    "cpl": ("label_smoothing", "length_normalize", "reference", "reference_dir"),
    "xpo": ("label_smoothing", "length_normalize"),
    "refuel": ("label_smoothing", "beta", "margin", "length_normalize"),
    "bfpo": ("label_smoothing",),
    "nash_md": (*_OF_GIVEN_PAIRS, "length_normalize"),
    "ipo_md": _OF_GIVEN_PAIRS,
}
"""Loss -> the keys of `preference` that it does not read, besides those of other losses."""
_OF_ONE_LOSS = {
    "pro": ("num_responses",),
    "cpl": ("cpl_bias", "gamma"),
    "xpo": ("xpo_alpha",),
    "refuel": ("refuel_eta",),
    "bfpo": ("bfpo_factor", "bfpo_shift"),
    "nash_md": ("mixture",),
    "ipo_md": ("mixture",),
}
_OF_MODELS = ("perplexity", "probability", "entropy")
"""Rules that read log-probs of a rollout."""


def preference_problems(config: Config) -> Iterator[str]:
    """Yield a line for every contradiction between `preference.loss` and other keys."""
    settings = config.preference
    own = _OF_ONE_LOSS.get(settings.loss, ())
    others = {name: None for names in _OF_ONE_LOSS.values() for name in names if name not in own}
    unread = [f"preference.{name}" for name in (*_UNREAD_BY_LOSS[settings.loss], *others)]
    yield from _unread(config, "preference.loss", unread)
    if settings.margin == "offset" and settings.loss not in ("dpo", "refuel", "pro"):
        yield (
            f"preference.margin=offset: preference.loss={settings.loss} has no offset. Use none or "
            "weight, or preference.loss=dpo."
        )
    if settings.has_actions and config.macro.rule in _OF_MODELS:
        yield (
            f"macro.rule={config.macro.rule}: reads what models say of a rollout; "
            "preference.loss=cpl has none. Use another rule, or preference.gamma=1."
        )


def online_problems(config: Config) -> Iterator[str]:
    """Yield a line for every contradiction between a loss on the policy's own pairs and others."""
    settings, rollout = config.preference, config.rollout
    key = f"preference.loss={settings.loss}"
    if not config.reward.source:
        yield (
            f"reward.source: {key} has its pairs judged; it is not set. Give the directory of a "
            "reward model or a code reward module:function."
        )
    if rollout.temperature == 0:
        yield f"rollout.temperature=0: {key} needs random samples. Use a value above 0, such as 1."
    defaults = Config()
    for name, why in (
        ("rollout.top_k", "learns from all tokens"),
        ("rollout.top_p", "learns from all tokens"),
        ("rollout.mask_interval", "learns from all tokens"),
        ("rollout.engine", "generates where it trains"),
        ("rollout.tensor_size", "generates where it trains"),
        ("rollout.pipeline_size", "generates where it trains"),
        ("rollout.samples_per_prompt", "draws two responses to each prompt"),
        ("rollout.filter", "learns from all pairs"),
        *((f"reward.{name}", "compares raw scores") for name in _SHAPES_SCORES),
    ):
        value = _value(config, name)
        if value != _value(defaults, name):
            shown = _shown(list(value) if isinstance(value, tuple) else value)
            yield f"{name}={shown}: {key} {why}. Remove it."
    others = {
        f"model.lora.rank={config.model.lora.rank}": config.model.lora.is_on,
        f"precision.fp8={config.precision.fp8}": config.precision.fp8 != "off",
    }
    for other, is_on in others.items():
        if settings.mixture and is_on:
            yield (
                f"preference.mixture={settings.mixture:g}: the reference generates beside the "
                f"policy, as a whole second model in its number format, not with {other}. Set it "
                "to 0."
            )


def reward_model_problems(config: Config) -> Iterator[str]:
    """Yield a line for every contradiction between the methods of a reward model."""
    settings = config.reward_model
    if settings.length_coef and settings.loss == "span":
        yield (
            f"reward_model.length_coef={settings.length_coef:g}: correlates the scores of last "
            "tokens with the length; reward_model.loss=span compares those of all tokens. Use "
            "reward_model.loss=last, or set it to 0."
        )
    if not settings.latent_size:
        return
    others = {
        "reward_model.loss=span": settings.loss == "span",
        f"reward_model.length_coef={settings.length_coef:g}": settings.length_coef > 0,
        "checkpoint.export_hf=true": config.checkpoint.export_hf,
    }
    for other in (name for name, is_set in others.items() if is_set):
        yield (
            f"reward_model.latent_size={settings.latent_size}: scores last tokens by what a user "
            f"prefers, as no Hugging Face model does; not with {other}. Set it to 0, or change "
            "that key."
        )


def method_problems(config: Config, data_size: int) -> Iterator[str]:
    """Yield a line for every contradiction between the methods of ppo and other keys.

    Args:
        config: the resolved configuration.
        data_size: data-parallel size.
    """
    yield from _unread(config, "ppo.estimator", _unread_by_estimator(config))
    yield from _unread(config, "ppo.objective", _UNREAD_BY_OBJECTIVE[config.ppo.objective])
    yield from _group_problems(config)
    yield from _p3o_problems(config, data_size)
    yield from _brain_problems(config)
    yield from _sampler_problems(config)
    yield from _mask_problems(config)
    yield from _filter_problems(config)
    yield from _combination_problems(config)
    yield from _dense_problems(config)
    yield from _shaping_problems(config)
    yield from _kl_factor_problems(config)
    ppo, macro = config.ppo, config.macro
    if ppo.gae_lambda_alpha is not None and ppo.gae_lambda != Config().ppo.gae_lambda:
        yield (
            f"ppo.gae_lambda={ppo.gae_lambda:g}: is replaced by the lambda of "
            f"ppo.gae_lambda_alpha={ppo.gae_lambda_alpha:g}. Remove one of the two."
        )
    if ppo.sampler_bounds != Config().ppo.sampler_bounds and ppo.sampler_mask is None:
        yield (
            f"ppo.sampler_bounds={_shown(list(ppo.sampler_bounds))}: needs ppo.sampler_mask, which "
            "is not set. Set it to token, macro or sequence, or remove the bounds."
        )
    if macro.rule == "entropy" and ppo.old_logprobs == "sampler":
        yield (
            "macro.rule=entropy: needs entropies, which the sampler does not give; "
            "ppo.old_logprobs=sampler. Set ppo.old_logprobs=trainer, or use another rule."
        )


def _unread_by_estimator(config: Config) -> tuple[str, ...]:
    if config.ppo.estimator == "gae":
        return ()
    if config.ppo.estimator == "sae":
        return ("macro.reward", "macro.lambda_unit")
    critic = tuple(f"critic.{name}" for name in type(config.critic).model_fields)
    of_steps = _OF_MACRO_STEPS if config.ppo.compares_groups else ()
    return (*critic, *_OF_THE_CRITIC, *of_steps)


def _unread(config: Config, choice: str, keys: Sequence[str]) -> Iterator[str]:
    """Refuse keys that are not at their default although what is chosen does not read them."""
    defaults = Config()
    for key in keys:
        value = _value(config, key)
        if value != _value(defaults, key):
            yield (
                f"{key}={_shown(value)}: {choice}={_value(config, choice)} does not use it; its "
                f"default is {_shown(_value(defaults, key))}. Remove it, or change {choice}."
            )


def _group_problems(config: Config) -> Iterator[str]:
    ppo, rollout = config.ppo, config.rollout
    if ppo.compares_groups and rollout.samples_per_prompt < 2:
        yield (
            f"rollout.samples_per_prompt={rollout.samples_per_prompt}: must be at least 2 for "
            f"ppo.estimator={ppo.estimator}, which compares the responses to a prompt. Raise it, "
            "or use another ppo.estimator."
        )
    others = {"remax": "greedy responses", "vine": "continuations"}.get(ppo.estimator)
    if others and rollout.ranks:
        yield (
            f"rollout.ranks={rollout.ranks}: ppo.estimator={ppo.estimator} also needs {others}, "
            "which the ranks that train generate. Set it to 0, or use another ppo.estimator."
        )


def _p3o_problems(config: Config, data_size: int) -> Iterator[str]:
    if config.ppo.objective != "p3o":
        return
    why = "learns from the difference of two responses"
    yield from _needed(config, "ppo.objective", _NEEDED_BY_P3O, why)
    for key, multiple in (("microbatch_size", 2), ("minibatch_size", 2 * data_size)):
        size = getattr(config.ppo, key)
        if size % multiple:
            yield (
                f"ppo.{key}={size}: must be a multiple of {multiple} for ppo.objective=p3o, which "
                f"keeps pairs together on {data_size} data-parallel rank(s). Change it."
            )


def _brain_problems(config: Config) -> Iterator[str]:
    if config.ppo.estimator != "brain":
        return
    why = "weights the likelihood of whole responses"
    yield from _needed(config, "ppo.estimator", _NEEDED_BY_BRAIN, why)
    if config.ppo.kl_coef == 0:
        yield (
            "ppo.kl_coef=0: must be above 0 for ppo.estimator=brain, whose temperature it is. Set "
            "it, or use another ppo.estimator."
        )


def _needed(config: Config, choice: str, keys: Mapping[str, Any], why: str) -> Iterator[str]:
    """Refuse values that what is chosen cannot work with."""
    for key, wanted in keys.items():
        value = _value(config, key)
        if value != wanted:
            yield (
                f"{key}={_shown(value)}: must be {_shown(wanted)} for {choice}="
                f"{_value(config, choice)}, which {why}. Change it, or use another {choice}."
            )


def _sampler_problems(config: Config) -> Iterator[str]:
    for key in ("ppo.tis_cap", "ppo.sampler_mask"):
        value = _value(config, key)
        if value is not None and config.ppo.old_logprobs == "sampler":
            yield (
                f"{key}={_shown(value)}: compares the trainer's log-probs with the sampler's; "
                "ppo.old_logprobs=sampler leaves only the latter. Set ppo.old_logprobs=trainer, or "
                f"{key}=null."
            )


def _mask_problems(config: Config) -> Iterator[str]:
    """Rules for NLPO, whose mask policy is a second model at the layout of training."""
    rollout, interval = config.rollout, config.rollout.mask_interval
    if interval is None:
        if rollout.mask_min_tokens != Config().rollout.mask_min_tokens:
            yield (
                f"rollout.mask_min_tokens={rollout.mask_min_tokens}: needs rollout.mask_interval, "
                "which is not set. Set it, or remove this key."
            )
        return
    key = f"rollout.mask_interval={interval}"
    if rollout.top_p == 1 or rollout.top_k:
        yield (
            f"{key}: the mask is the older policy's top_p, without top_k; rollout.top_p="
            f"{rollout.top_p:g}, rollout.top_k={rollout.top_k}. Use rollout.top_p=0.9 and "
            "rollout.top_k=0, or remove it."
        )
    others = {
        f"rollout.ranks={rollout.ranks}": rollout.ranks > 0,
        "a rollout layout of its own": config.moves_weights,
        f"model.lora.rank={config.model.lora.rank}": config.model.lora.is_on,
        f"precision.fp8={config.precision.fp8}": config.precision.fp8 != "off",
    }
    for other, is_on in others.items():
        if is_on:
            yield (
                f"{key}: the mask policy is a whole second model where the policy trains, in its "
                f"number format; it does not go with {other}. Remove one of them."
            )


def _filter_problems(config: Config) -> Iterator[str]:
    """Rules for what is trained on of what is generated."""
    ppo, rollout = config.ppo, config.rollout
    chosen = rollout.filter
    if chosen is None:
        return
    samples = rollout.samples_per_prompt
    if chosen != "pf_ppo" and samples < 2:
        yield (
            f"rollout.samples_per_prompt={samples}: must be at least 2 for rollout.filter="
            f"{chosen}, which compares the responses to a prompt. Raise it, or remove the filter."
        )
    if chosen in ("pf_ppo", "best_of_n") and ppo.compares_groups:
        yield (
            f"rollout.filter={chosen}: does not keep the responses to a prompt together, which "
            f"ppo.estimator={ppo.estimator} compares. Use another filter or ppo.estimator."
        )
    if chosen == "dynamic" and rollout.staleness:
        yield (
            "rollout.filter=dynamic: asks for new prompts after scores are known; with "
            f"rollout.staleness={rollout.staleness} the next step's samples are generated by then. "
            "Set rollout.staleness=0, or use another filter."
        )


def _combination_problems(config: Config) -> Iterator[str]:
    reward, ppo = config.reward, config.ppo
    if reward.combine != "sum" and len(reward.source) < 2:
        yield (
            f"reward.combine={reward.combine}: needs two sources or more; reward.source has "
            f"{len(reward.source)}. Add one, or remove reward.combine."
        )
    others = {
        f"reward.shaping={_shown(list(reward.shaping))}": reward.compares_references,
        f"ppo.estimator={ppo.estimator}": ppo.estimator in ("remax", "vine"),
        "rollout.filter=dynamic": config.rollout.filter == "dynamic",
    }
    for other, scores_another_batch in others.items():
        if reward.combine == "maxmin" and scores_another_batch:
            yield (
                f"reward.combine=maxmin: takes one source for each batch; {other} would compare "
                "it with another batch, and so another source. Change one of them."
            )
    if reward.constraints and ppo.objective == "p3o":
        yield (
            "ppo.objective=p3o: learns from the difference of two responses, so one that violates "
            "reward.constraints could become likelier. Use another ppo.objective."
        )


def _dense_problems(config: Config) -> Iterator[str]:
    others = {"remax": "a greedy response", "vine": "continuations"}.get(config.ppo.estimator)
    if config.reward.dense and others:
        yield (
            f"ppo.estimator={config.ppo.estimator}: compares with the score of {others}, without "
            "a part in reward.dense. Use another ppo.estimator, or remove reward.dense."
        )


def _shaping_problems(config: Config) -> Iterator[str]:
    reward, names = config.reward, config.reward.shaping
    shown = f"reward.shaping={_shown(list(names))}"
    if len(set(names)) < len(names):
        yield f"{shown}: must name each function once. Remove one."
    for name in names[1:]:
        if name in ("par", "center_reference"):
            yield (
                f"{shown}: {name} compares raw scores with those of references, so it must come "
                "first, and alone of its kind. Change the order, or remove one."
            )
    if "z_score" in names and reward.normalize != "none":
        yield (
            f"reward.normalize={reward.normalize}: z_score of reward.shaping already normalises, "
            "by the batch instead of by all scores so far. Remove one of the two."
        )
    if "length_penalty" in names and reward.length_coef == 0:
        yield (
            "reward.length_coef=0: length_penalty of reward.shaping subtracts nothing. Set it to "
            "the penalty of a token, or remove length_penalty."
        )
    longest, buffer = config.rollout.max_response_tokens, reward.overlong_buffer
    if "overlong" in names and buffer is not None and buffer > longest:
        yield (
            f"reward.overlong_buffer={buffer}: must not exceed rollout.max_response_tokens="
            f"{longest}, before which it lies. Lower it."
        )


def _kl_factor_problems(config: Config) -> Iterator[str]:
    reward, estimator = config.reward, config.ppo.estimator
    if reward.kl_max is None:
        return
    others = {"remax": "greedy responses", "vine": "continuations"}.get(estimator)
    if others:
        yield (
            f"reward.kl_max={reward.kl_max:g}: scales the reward by a divergence that {others} of "
            f"ppo.estimator={estimator} do not have. Use another ppo.estimator, or remove it."
        )
    needed: dict[str, list[Any]] = {
        "reward.shaping": [("par",), ("center_reference",)],
        "reward.normalize": ["none"],
        "reward.missing_eos": ["none"],
    }
    for key, values in needed.items():
        value = _value(config, key)
        if value not in values:
            shown = " or ".join(_shown(list(v) if isinstance(v, tuple) else v) for v in values)
            value = list(value) if isinstance(value, tuple) else value
            yield (
                f"reward.kl_max={reward.kl_max:g}: shrinks the reward, so none may be negative; "
                f"needs {key}={shown}, not {_shown(value)}. Change that key, or remove it."
            )


def _value(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _shown(value: Any) -> str:
    """Write a value as a configuration has it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case list():
            return f"[{','.join(map(_shown, value))}]"
    return str(value)
