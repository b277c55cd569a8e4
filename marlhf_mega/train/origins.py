"""Where the first weights of a job's models come from, and whether they suit it."""

from pathlib import Path
from typing import Any

from marlhf_mega.checkpoint.contents import roles_of
from marlhf_mega.config.checks import Job, check_other_model, generates
from marlhf_mega.config.lora import LoraConfig
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.origin import Origin, find_origin, first_origin
from marlhf_mega.config.schema import Config
from marlhf_mega.data.tokenizer import Tokenizer, has_tokenizer


def policy_origin(config: Config) -> Origin | None:
    """Return where the policy's first weights come from; none: random."""
    return first_origin(config.model)


def other_policy_origin(config: Config, tokenizer: Tokenizer) -> Origin | None:
    """Return where the policy to compare with is, `evaluate.against`; none if there is none.

    Its weights take the place of the policy's own, so it must have the same architecture.

    Raises:
        ValueError: it is missing, is no policy, or has another tokenizer or architecture.
    """
    if config.evaluate.against is None:
        return None
    key = "evaluate.against"
    origin = origin_of(config.evaluate.against, tokenizer, key=key)
    if "policy" not in roles_of(origin, key=key):
        raise ValueError(
            f"{key}={origin.path}: must be a policy; it is a reward model. Give the run or folder "
            "of a language model."
        )
    ours, theirs = _architecture(config.model), _architecture(origin.model)
    if different := [name for name in ours if ours[name] != theirs[name]]:
        name = different[0]
        raise ValueError(
            f"{key}={origin.path}: must have the architecture of the policy, model.{name}="
            f"{ours[name]}; its own is {theirs[name]}. Evaluate each by itself instead."
        )
    return origin


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """Return all that decides which function given weights are; what a default stands for is said.

    Leaves out where weights come from, how they are trained, and how long texts may be.
    """
    resolved = {
        "num_query_groups": model.query_groups,
        "head_dim": model.kv_channels,
        "query_scale": model.query_scale or model.kv_channels,
        "expert_ffn_hidden_size": model.expert_ffn_hidden_size or model.ffn_hidden_size,
    }
    unrelated = {"hf_path", "init", "init_std", "lora", "max_positions", "router_aux_loss_coef"}
    return model.model_dump(exclude=unrelated) | resolved


def reward_origins(config: Config, tokenizer: Tokenizer) -> list[Origin]:
    """Return where the learned reward models come from, in the config's order.

    Raises:
        ValueError: one is missing or does not fit the tokenizer.
    """
    judges = config.reward.models
    origins = [origin_of(judge.source, tokenizer, key=judge.key) for judge in judges]
    for judge, origin in zip(judges, origins, strict=True):
        roles = roles_of(origin, key=judge.key)
        if judge.is_language and "policy" not in roles:
            raise ValueError(
                f"{judge.key}={origin.path}: must be a language model, for its log-probs; it is a "
                "reward model. Use another model."
            )
        if judge.is_language:
            continue
        if "reward" not in roles:
            what = "a policy and its critic" if "critic" in roles else "a language model"
            raise ValueError(
                f"{judge.key}={origin.path}: must be a reward model; it is {what}. "
                "Train one from it with `marlhf reward`."
            )
    return origins


def critic_origin(config: Config, tokenizer: Tokenizer, rewards: list[Origin]) -> Origin | None:
    """Return where the critic's first weights come from.

    Raises:
        ValueError: it is missing or does not fit the tokenizer.
    """
    if config.critic_from_policy:
        return policy_origin(config)
    if config.critic.init == "reward":
        assert config.reward.critic_model is not None
        return rewards[config.reward.critic_model]
    return origin_of(config.critic.init, tokenizer, key="critic.init")


def reference_origin(config: Config, tokenizer: Tokenizer) -> Origin | None:
    """Return where the reference of `preference` comes from; none: random weights.

    Raises:
        ValueError: it is missing, is no language model or does not fit the tokenizer.
    """
    path, key = config.preference.reference, "preference.reference"
    if path == "policy":
        return policy_origin(config)
    origin = origin_of(path, tokenizer, key=key)
    if "policy" not in roles_of(origin, key=key):
        raise ValueError(
            f"{key}={path}: must be a language model; it is a reward model. Use `policy`, or the "
            "run or folder of a policy."
        )
    return origin


def check_origins(config: Config, job: Job, tokenizer: Tokenizer, num_ranks: int) -> None:
    """Check that the models of a job are there, share its tokenizer and fit the layout.

    Args:
        config: of the run.
        job: evaluations have no critic, sft and reward train the policy's model alone.
        tokenizer: that they share.
        num_ranks: that train.

    Raises:
        ValueError: anything that the user has to fix.
    """
    policy_origin(config)
    if config.model.lora.path is not None:
        _check_adapters(config.model, config.model.lora.path, job)
    if job == "preference" and (start := reference_origin(config, tokenizer)) is not None:
        what = f"preference.reference={start.path}"
        check_other_model(config, start.model, num_ranks, what=what, learns=False)
    if not generates(config, job):
        return
    if job == "evaluate":
        other_policy_origin(config, tokenizer)
    rewards = reward_origins(config, tokenizer)
    for judge, origin in zip(config.reward.models, rewards, strict=True):
        what = f"{judge.key}={origin.path}"
        check_other_model(config, origin.model, num_ranks, what=what, learns=False)
    has_critic = job == "offline" or (job == "ppo" and config.ppo.has_critic)
    start = critic_origin(config, tokenizer, rewards) if has_critic else None
    if start is not None:
        what = f"critic.init={config.critic.init}"
        check_other_model(config, start.model, num_ranks, what=what, learns=job == "ppo")
    if job == "ppo":
        _check_shared_bases(config, rewards, start)


def _check_adapters(model: ModelConfig, folder: Path, job: Job) -> None:
    # Imports Megatron, which no other check needs.
    from marlhf_mega.checkpoint.hf.adapters import AdapterTable
    from marlhf_mega.checkpoint.hf.peft import check_adapters
    from marlhf_mega.checkpoint.hf.table import WeightTable

    whole = WeightTable(model, "sequence_classification" if job == "reward" else "causal_lm")
    check_adapters(folder, [AdapterTable(model, "causal_lm"), whole])


def _check_shared_bases(config: Config, rewards: list[Origin], critic: Origin | None) -> None:
    """Refuse models that are not adapters on the base of the policy, where they are to share it.

    Whether its weights are still the same, their hash tells when they are loaded.
    """
    if config.reward.share_base:
        for judge, origin in zip(config.reward.models, rewards, strict=True):
            _check_shared_base(config, origin, key=judge.key, option="reward.share_base")
    if not (config.ppo.has_critic and config.critic.share_base) or config.critic_from_policy:
        return
    assert critic is not None
    _check_shared_base(config, critic, key="critic.init", option="critic.share_base")
    for name, ours in _adapters(config.model.lora).items():
        theirs = _adapters(critic.lora)[name]
        if ours != theirs:
            raise ValueError(
                f"model.lora.{name}={ours}: must be that of {critic.path}, {theirs}, whose "
                "adapters the critic goes on from with critic.share_base=true. Set it, or use "
                "critic.init=policy."
            )


def _adapters(lora: LoraConfig) -> dict[str, str]:
    """Return what the shape and the function of adapters depend on, as text."""
    alpha = lora.scale * lora.size  # with rank_stabilized not the key's value
    return {
        "rank": str(lora.size),
        "targets": f"[{','.join(lora.modules)}]",
        "alpha": f"{alpha:g}",
    }


def _check_shared_base(config: Config, origin: Origin, *, key: str, option: str) -> None:
    start = policy_origin(config)
    what = f"{key}={origin.path}: must be adapters on the policy's base, with {option}=true"
    if not origin.lora.is_on:
        raise ValueError(
            f"{what}; all its weights are its own. Train it with model.lora.rank, or set {option} "
            "to false."
        )
    ours, theirs = (None if o is None else o.path.resolve() for o in (start, origin.base))
    if ours != theirs:
        raise ValueError(
            f"{what}; they are on {theirs or 'random weights'}, and the policy begins from "
            f"{ours or 'random weights'}. Begin both from the same model, or set {option} to false."
        )


def check_same_tokenizer(origin: Origin, tokenizer: Tokenizer, *, key: str) -> None:
    """Refuse a model that was trained with another vocabulary.

    A Hugging Face folder that has no tokenizer tells nothing about it.

    Raises:
        ValueError: the vocabularies differ.
    """
    if not origin.is_run and has_tokenizer(origin.path):
        other = tokenizer.difference(Tokenizer.load(origin.path, key=key))
        if other is not None:
            raise ValueError(
                f"{key}={origin.path}: must have been trained with the vocabulary of this run; "
                f"{other}. Use a model of the same tokenizer."
            )
    theirs, ours = origin.tokenizer_fingerprint, tokenizer.fingerprint()
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"{key}={origin.path}: must have been trained with the tokenizer of this run "
            f"({ours[:12]}); its own is {theirs[:12]}. Use the same tokenizer.path."
        )
    size = origin.model.vocab_size
    if size is not None and size < tokenizer.num_known:
        raise ValueError(
            f"{key}={origin.path}: its vocabulary of {size} must hold the {tokenizer.num_known} "
            "tokens that texts may have. Use the tokenizer that belongs to the model."
        )


def origin_of(path: str, tokenizer: Tokenizer, *, key: str) -> Origin:
    """Find a model on disk and check that it speaks the run's vocabulary.

    Raises:
        ValueError: it is missing or does not fit.
    """
    origin = find_origin(Path(path), key=key)
    check_same_tokenizer(origin, tokenizer, key=key)
    return origin
