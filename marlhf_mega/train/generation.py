"""What generates: in place, at a layout of its own, or on other ranks; and what it is judged by."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from marlhf_mega.checkpoint.reshard import connect_learning
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.experience.evaluation import Evaluator
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.models.gpt import StageModel, build_chunks
from marlhf_mega.parallel.mesh import Mesh, create_second_mesh, use_mesh
from marlhf_mega.parallel.resharder import Resharder
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.protocol import ResponseGenerator
from marlhf_mega.rollout.remote import RemoteTransport, RolloutTransport
from marlhf_mega.rollout.reshard import ReshardedGenerator
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.transport import LocalTransport
from marlhf_mega.train.build import build_judges, build_model
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.origins import policy_origin, reward_origins

logger = logging.getLogger(__name__)


def build_judged_policy(
    config: Config, tokenizer: Tokenizer, mesh: Mesh, *, learns: bool = False
) -> tuple[list[StageModel], Scorer, ResponseGenerator]:
    """Build a policy, what scores its responses, and what generates them."""
    still = config.model_copy(update={"model": config.model.plain})
    config = config if learns else still
    policy = build_model(config.model, config, mesh, origin=policy_origin(config), name="policy")
    # Held-out answers get scores alone.
    scores = config.reward.model_copy(update={"dense": ()})
    config = config.model_copy(update={"reward": scores})
    rewards = build_judges(config, mesh, reward_origins(config, tokenizer))
    scorer = Scorer(config.reward, rewards, tokenizer, mesh)
    generator, _ = build_generator(policy, config, mesh, stop=StopRule.of(tokenizer))
    return policy, scorer, generator


def build_evaluator(
    inputs: Inputs[Any], mesh: Mesh, *, limit: MicrobatchLimit, learns: bool = False
) -> tuple[list[StageModel], Evaluator]:
    """Build a policy, and what judges its answers to the held-out prompts."""
    config, tokenizer = inputs.config, inputs.tokenizer
    policy, scorer, generator = build_judged_policy(config, tokenizer, mesh, learns=learns)
    prompts = inputs.validation
    return policy, Evaluator(config, prompts, tokenizer, scorer, generator, mesh, limit=limit)


def generator_in_place(
    policy: Sequence[StageModel],
    config: Config,
    mesh: Mesh,
    *,
    stop: StopRule,
    second: Sequence[StageModel] = (),
) -> ResponseGenerator:
    """Build what generates with the weights where they are trained.

    Ranks that share sequences in training are replicas of their own while they generate. `second`
    is another model at the same layout, for rules that ask it.
    """
    graphs = config.rollout.cuda_graphs
    generator = partial(Generator, policy, stop=stop, cuda_graphs=graphs, second=second)
    if mesh.cp_size == 1:
        return generator(mesh)
    replicas = create_second_mesh(mesh.parallel.generating, mesh)
    return ReshardedGenerator(generator(replicas), training=mesh, weights=nullcontext)


def build_generator(
    policy: Sequence[StageModel], config: Config, mesh: Mesh, *, stop: StopRule
) -> tuple[ResponseGenerator, Resharder | None]:
    """Build what generates, at the rollout's own layout where the config gives it one.

    Args:
        policy: this rank's chunks of the weights that are trained.
        config: of the run.
        mesh: this rank's mesh in training.
        stop: ends a response.

    Returns:
        The generator, and what moves the weights to its layout, none where it is training's.
    """
    if not config.moves_weights:
        return generator_in_place(policy, config, mesh, stop=stop), None
    second = create_second_mesh(config.rollout_parallel, mesh)
    with use_mesh(second):
        chunks = build_chunks(config.model, config.precision, second, head="language", frozen=True)
    resharder = connect_learning((policy, mesh), (chunks, second))
    resharder.release()
    logger.info(
        "rollout: %s; %.3f GiB of weights travel in each",
        second.describe(),
        resharder.total_bytes / 2**30,
    )
    graphs = config.rollout.cuda_graphs
    generator = Generator(chunks, second, stop=stop, cuda_graphs=graphs)
    return ReshardedGenerator(generator, training=mesh, weights=resharder.fresh_weights), resharder


def build_transport(
    policy: Sequence[StageModel],
    config: Config,
    mesh: Mesh,
    *,
    stop: StopRule,
    mask: Sequence[StageModel] = (),
) -> tuple[ResponseGenerator, RolloutTransport]:
    """Build what brings a PPO step's samples, and what generates for evaluations.

    Args:
        policy: this rank's chunks of the weights that are trained.
        config: of the run.
        mesh: this rank's mesh in training.
        stop: ends a response.
        mask: this rank's chunks of the mask policy, if there is one.
    """
    if mask:
        masked = generator_in_place(policy, config, mesh, stop=stop, second=mask)
        return masked, LocalTransport(masked, config, mesh)
    if config.rollout.ranks:
        remote = RemoteTransport(connect_learning((policy, mesh), None), mesh)
        return generator_in_place(policy, config, mesh, stop=stop), remote
    generator, resharder = build_generator(policy, config, mesh, stop=stop)
    return generator, LocalTransport(generator, config, mesh, resharder=resharder)
