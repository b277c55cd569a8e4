"""Models with weights: build a role's chunks and fill them from where they come from."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from marlhf_mega.checkpoint.reshard import connect
from marlhf_mega.checkpoint.weights import fill_from, fill_random, roles_of
from marlhf_mega.config.checks import check_other_model
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.origin import Origin, find_origin
from marlhf_mega.config.schema import Config
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.models.gpt import Head, StageModel, build_chunks
from marlhf_mega.models.offload import create_offload
from marlhf_mega.models.roles import Roles
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import Mesh, create_second_mesh, in_force
from marlhf_mega.parallel.transfer import Mover
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.reshard import ReshardedGenerator
from marlhf_mega.train.inputs import origin_of

logger = logging.getLogger(__name__)


def build_model(
    model: ModelConfig,
    config: Config,
    mesh: Mesh,
    *,
    head: Head,
    origin: Origin | None,
    name: str,
    frozen: bool = False,
) -> list[StageModel]:
    """Build a role on this rank and fill it.

    Args:
        model: the architecture.
        config: of the run.
        mesh: where this rank stands.
        head: language or scalar.
        origin: where the weights come from; none: random ones.
        name: of the role, for the report of fresh tensors.
        frozen: it will not learn.

    Returns:
        This rank's chunks.
    """
    precision = config.precision.frozen() if frozen else config.precision
    chunks = build_chunks(model, precision, mesh, head=head, memory=config.memory)
    if origin is None:
        fill_random(chunks, mesh, seed=config.run.seed)
        logger.info("%s: all weights are random (seed %d)", name, config.run.seed)
        return chunks
    once = config.checkpoint.import_once
    fresh = fill_from(origin, chunks, mesh, seed=config.run.seed, import_once=once)
    logger.info(
        "%s: weights from %s; freshly initialised: %s",
        name,
        origin.path,
        ", ".join(fresh) if fresh else "nothing",
    )
    return chunks


def policy_origin(config: Config) -> Origin | None:
    """Return where the policy's first weights come from; none: random."""
    model = config.model
    if model.init not in ("auto", "random"):
        return find_origin(Path(model.init), key="model.init")
    if model.hf_path is not None and model.init == "auto":
        return find_origin(model.hf_path, key="model.hf_path", base=model)
    return None


def reward_origins(config: Config, tokenizer: Tokenizer) -> list[Origin]:
    """Return where the learned reward models come from, in the config's order.

    Raises:
        ValueError: one is missing or does not fit the tokenizer.
    """
    terms = [term for term in config.reward.source if term.is_model]
    origins = [origin_of(term.source, tokenizer, key="reward.source") for term in terms]
    for origin in origins:
        roles = roles_of(origin, key="reward.source")
        if "reward" not in roles:
            what = "a policy and its critic" if "critic" in roles else "a language model"
            raise ValueError(
                f"reward.source={origin.path}: must be a reward model; it is {what}. "
                "Train one from it with `marlhf reward`."
            )
    return origins


def critic_origin(config: Config, tokenizer: Tokenizer, rewards: list[Origin]) -> Origin | None:
    """Return where the critic's first weights come from.

    Raises:
        ValueError: it is missing or does not fit the tokenizer.
    """
    match config.critic.init:
        case "reward" if rewards:
            return rewards[0]
        case "reward" | "policy":
            return policy_origin(config)
        case path:
            return origin_of(path, tokenizer, key="critic.init")


def check_scalar_models(
    config: Config, tokenizer: Tokenizer, num_ranks: int, *, critic: bool
) -> None:
    """Check that the reward models and the critic are there and fit the layout.

    Args:
        config: of the run.
        tokenizer: that they share.
        num_ranks: that train.
        critic: whether the job has one.

    Raises:
        ValueError: anything that the user has to mend.
    """
    rewards = reward_origins(config, tokenizer)
    for origin in rewards:
        what = f"reward.source={origin.path}"
        check_other_model(config, origin.model, num_ranks, what=what, learns=False)
    start = critic_origin(config, tokenizer, rewards) if critic else None
    if start is not None:
        what = f"critic.init={config.critic.init}"
        check_other_model(config, start.model, num_ranks, what=what, learns=True)


def optimizer_steps(config: Config, num_steps: int) -> dict[str, int]:
    """Return how many steps each optimizer takes in a run of `num_steps` PPO steps."""
    each = config.ppo.epochs * (config.rollout.batch_size // config.ppo.minibatch_size)
    resting = min(config.critic.warmup_ppo_steps, num_steps)
    return {"policy": (num_steps - resting) * each, "critic": num_steps * each}


def build_roles(config: Config, tokenizer: Tokenizer, mesh: Mesh, *, num_steps: int) -> Roles:
    """Build the four models of ppo.

    Args:
        config: of the run.
        tokenizer: that all of them share.
        mesh: where this rank stands.
        num_steps: PPO steps of the whole run, for the learning-rate schedules.
    """
    start = policy_origin(config)
    rewards = reward_origins(config, tokenizer)
    critic = critic_origin(config, tokenizer, rewards)
    policy = build_model(config.model, config, mesh, head="language", origin=start, name="policy")
    reference = build_model(
        config.model, config, mesh, head="language", origin=start, name="reference", frozen=True
    )
    critic_model = config.model if critic is None else critic.model
    critic_chunks = build_model(
        critic_model, config, mesh, head="scalar", origin=critic, name="critic"
    )
    models = [
        build_model(
            origin.model, config, mesh, head="scalar", origin=origin, name="reward", frozen=True
        )
        for origin in rewards
    ]
    for chunks in (reference, *models):
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
    steps = optimizer_steps(config, num_steps)
    learn = partial(TrainState, overlap=config.parallel.overlap)
    learners = {
        "policy": learn(policy, config.policy, total_steps=steps["policy"]),
        "critic": learn(critic_chunks, config.critic, total_steps=steps["critic"]),
    }
    offload = create_offload(
        config.memory,
        mesh.platform,
        config.run.dir,
        **learners,
        reference=reference,
        rewards=models,
    )
    return Roles(**learners, reference=reference, rewards=models, offload=offload)


def generator_in_place(
    policy: Sequence[StageModel], config: Config, mesh: Mesh, *, eos_id: int
) -> Generator | ReshardedGenerator:
    """Build what generates with the weights where they are trained.

    Ranks that share sequences in training are replicas of their own while they generate.
    """
    generator = partial(Generator, policy, eos_id=eos_id, cuda_graphs=config.rollout.cuda_graphs)
    if mesh.cp_size == 1:
        return generator(mesh)
    replicas = create_second_mesh(mesh.parallel.generating, mesh)
    return ReshardedGenerator(generator(replicas), training=mesh, weights=nullcontext)


def build_generator(
    policy: Sequence[StageModel], config: Config, mesh: Mesh, *, eos_id: int
) -> tuple[Generator | ReshardedGenerator, Mover | None]:
    """Build what generates, at the rollout's own layout where the config gives it one.

    Args:
        policy: this rank's chunks of the weights that are trained.
        config: of the run.
        mesh: where this rank stands in training.
        eos_id: ends a response.

    Returns:
        The generator, and what moves the weights to its layout, none where it is training's.
    """
    if not config.moves_weights:
        return generator_in_place(policy, config, mesh, eos_id=eos_id), None
    second = create_second_mesh(config.rollout_parallel, mesh)
    with in_force(second):
        chunks = build_chunks(config.model, config.precision, second, head="language")
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
    mover = connect((policy, mesh), (chunks, second))
    mover.release()
    logger.info(
        "rollout: %s; %.3f GiB of weights travel in each",
        second.describe(),
        mover.total_bytes / 2**30,
    )
    graphs = config.rollout.cuda_graphs
    generator = Generator(chunks, second, eos_id=eos_id, cuda_graphs=graphs)
    return ReshardedGenerator(generator, training=mesh, weights=mover.present), mover
