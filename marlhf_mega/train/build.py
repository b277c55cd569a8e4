"""Models with weights: build a role's chunks and fill them from where they come from."""

import logging
import math
from collections.abc import Sequence
from typing import Literal

from marlhf_mega.checkpoint.hf.peft import import_adapters
from marlhf_mega.checkpoint.store import load_weights
from marlhf_mega.checkpoint.weights import (
    adapter_table_of,
    digest_of_base,
    fill_adapters,
    fill_from,
    fill_random,
    layout_of,
    learning_parts,
)
from marlhf_mega.config.lora import LoraConfig
from marlhf_mega.config.model import Head, ModelConfig
from marlhf_mega.config.origin import Origin
from marlhf_mega.config.schema import Config
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.models.gpt import StageModel, attach_adapters, build_chunks
from marlhf_mega.models.offload import create_offload
from marlhf_mega.models.roles import Roles
from marlhf_mega.models.shared_base import build_on_base
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.train.origins import critic_origin, policy_origin, reward_origins
from marlhf_mega.train.steps import optimizer_steps

logger = logging.getLogger(__name__)


def build_model(
    model: ModelConfig,
    config: Config,
    mesh: Mesh,
    *,
    origin: Origin | None,
    name: Literal["policy", "reference", "critic", "reward", "judge"],
    frozen: bool = False,
    length_head: bool = False,
    latent_size: int = 0,
) -> list[StageModel]:
    """Build a role on this rank and fill it.

    Args:
        model: the architecture.
        config: of the run.
        mesh: this rank's mesh.
        origin: where the weights come from; none: random ones.
        name: of the role, which tells the head.
        frozen: it will not learn.
        length_head: a reward model gets a second head, see `ScalarHead`.
        latent_size: of the latent per user that a reward model has; 0 means none.

    Returns:
        This rank's chunks.
    """
    precision = config.precision.frozen() if frozen else config.precision
    head: Head = "language" if name in ("policy", "reference", "judge") else "scalar"
    model = model.plain if frozen else model.adapted(config.model.lora)
    chunks = build_chunks(
        model,
        precision,
        mesh,
        head=head,
        memory=config.memory,
        frozen=frozen,
        length_head=length_head,
        latent_size=latent_size,
        adapters=False,
    )
    if origin is None:
        fill_random(chunks, mesh, seed=config.run.seed)
        logger.info("%s: all weights are random (seed %d)", name, config.run.seed)
    else:
        once = config.checkpoint.import_once
        fresh = fill_from(origin, chunks, mesh, seed=config.run.seed, import_once=once)
        new = f"; freshly initialised: {', '.join(fresh)}" if fresh else ""
        logger.info("%s: weights from %s%s", name, origin.path, new)
    if model.lora.is_on:
        _add_adapters(chunks, config, mesh, name=name)
    return chunks


def _add_adapters(chunks: list[StageModel], config: Config, mesh: Mesh, *, name: str) -> None:
    attach_adapters(chunks, mesh)
    digest, folder = digest_of_base(chunks, mesh), config.model.lora.path
    if folder is None:
        fill_adapters(chunks, mesh, seed=config.run.seed)
    else:
        parts, layout = learning_parts(chunks), layout_of(mesh, chunks[0].model)
        import_adapters(folder, parts, layout, digest=digest)
    for chunk in chunks:
        chunk.base_digest = digest
    learning = sum(math.prod(shape) for shape in adapter_table_of(chunks).tensors.values())
    logger.info(
        "%s: %s parameters in adapters of rank %d learn; all other weights, hash %s, are frozen",
        name,
        f"{learning:,}",
        config.model.lora.size,
        digest,
    )


def build_roles(config: Config, tokenizer: Tokenizer, mesh: Mesh, *, num_steps: int) -> Roles:
    """Build the models of ppo; no critic or reference where nothing needs one.

    Args:
        config: of the run.
        tokenizer: that all of them share.
        mesh: this rank's mesh.
        num_steps: PPO steps of the whole run, for the learning-rate schedules.
    """
    start = policy_origin(config)
    rewards = reward_origins(config, tokenizer)
    policy = build_model(config.model, config, mesh, origin=start, name="policy")
    reference = None
    if config.has_reference and config.model.lora.is_on:
        reference = policy  # its frozen weights are those that it began with
    elif config.has_reference:
        reference = build_model(
            config.model, config, mesh, origin=start, name="reference", frozen=True
        )
    critic = None
    if config.ppo.has_critic:
        critic = _critic_chunks(config, tokenizer, mesh, rewards, policy)
    models = build_judges(config, mesh, rewards, policy)
    steps = optimizer_steps(config, num_steps)
    overlap = config.parallel.overlap
    learner = TrainState(policy, config.policy, total_steps=steps["policy"], overlap=overlap)
    second = None
    if critic is not None:
        second = TrainState(critic, config.critic, total_steps=steps["critic"], overlap=overlap)
    offload = create_offload(
        config.memory,
        mesh.platform,
        config.run.dir,
        policy=learner,
        critic=second,
        reference=None if reference is policy else reference,
        rewards=models,
    )
    return Roles(
        policy=learner, critic=second, reference=reference, rewards=models, offload=offload
    )


def build_judges(
    config: Config,
    mesh: Mesh,
    origins: Sequence[Origin],
    policy: Sequence[StageModel] | None = None,
) -> list[list[StageModel]]:
    """Build the reward models, and language models that serve as such, from `reward_origins`.

    With `reward.share_base` and a policy with adapters they are on its base.
    """
    if policy is not None and config.reward.share_base:
        return [
            _on_base(policy, config, mesh, origin=origin, name="reward", lora=origin.lora)
            for origin in origins
        ]
    return [
        build_model(
            origin.model,
            config,
            mesh,
            origin=origin,
            name="judge" if judge.is_language else "reward",
            frozen=True,
        )
        for judge, origin in zip(config.reward.models, origins, strict=True)
    ]


def _critic_chunks(
    config: Config,
    tokenizer: Tokenizer,
    mesh: Mesh,
    rewards: list[Origin],
    policy: Sequence[StageModel],
) -> list[StageModel]:
    origin = critic_origin(config, tokenizer, rewards)
    if config.critic.share_base:
        known = None if config.critic_from_policy else origin
        lora = config.model.lora
        return _on_base(policy, config, mesh, origin=known, name="critic", lora=lora)
    model = config.model if origin is None else origin.model
    return build_model(model, config, mesh, origin=origin, name="critic")


def _on_base(
    policy: Sequence[StageModel],
    config: Config,
    mesh: Mesh,
    *,
    origin: Origin | None,
    name: Literal["critic", "reward"],
    lora: LoraConfig,
) -> list[StageModel]:
    """Build a model on the policy's base, with adapters and head of a run, or with new ones."""
    frozen = name == "reward"
    chunks = build_on_base(
        policy,
        config.model.adapted(lora),
        config.precision.frozen() if frozen else config.precision,
        mesh,
        memory=config.memory,
        frozen=frozen,
    )
    fill_random(chunks, mesh, seed=config.run.seed, only="output_layer")
    if origin is None:
        fill_adapters(chunks, mesh, seed=config.run.seed)
    else:
        load_weights(origin.path, chunks, mesh)
    where = "new" if origin is None else f"from {origin.path}"
    logger.info("%s: on the policy's base; adapters and head are %s", name, where)
    return chunks
