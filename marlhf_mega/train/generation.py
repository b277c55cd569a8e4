"""What generates: in place, at a layout of its own, or on other ranks; and what it is judged by."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from marlhf_mega.checkpoint.reshard import connect_learning
from marlhf_mega.checkpoint.whole_tensors import WholeTensors
from marlhf_mega.config.hf_write import hf_config_from_model
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.experience.evaluation import Evaluator
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.models.gpt import StageModel, build_chunks
from marlhf_mega.models.spec import compute_dtype
from marlhf_mega.parallel.mesh import Mesh, create_second_mesh, use_mesh
from marlhf_mega.parallel.resharder import Resharder
from marlhf_mega.plan.generation import engine_cache_bytes, engine_slots
from marlhf_mega.platform import vllm
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.protocol import ResponseGenerator
from marlhf_mega.rollout.remote import RemoteTransport, RolloutTransport
from marlhf_mega.rollout.reshard import ReshardedGenerator
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.transport import LocalTransport
from marlhf_mega.rollout.vllm_engine import EngineOptions, VllmEngine
from marlhf_mega.rollout.vllm_generator import VllmGenerator
from marlhf_mega.train.build import build_judges, build_model
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.origins import policy_origin, reward_origins

logger = logging.getLogger(__name__)

ENGINE_GAP = 1e-4
"""Largest mean difference of log-probs in float32 on CPUs; 1e-6 was measured."""


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
) -> tuple[ResponseGenerator, Resharder | WholeTensors | None]:
    """Build what generates, at the rollout's own layout where the config gives it one.

    Args:
        policy: this rank's chunks of the weights that are trained.
        config: of the run.
        mesh: this rank's mesh in training.
        stop: ends a response.

    Returns:
        The generator, and what moves the weights to its layout, none where it is training's.
    """
    if config.rollout.engine == "vllm":
        return _build_vllm(policy, config, mesh, stop=stop)
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


def _build_vllm(
    policy: Sequence[StageModel], config: Config, mesh: Mesh, *, stop: StopRule
) -> tuple[ResponseGenerator, WholeTensors]:
    second = create_second_mesh(config.rollout_parallel, mesh)
    generator = start_vllm(config, second, stop=stop)
    weights = WholeTensors((policy, mesh), config.model, mesh, receives=True)
    logger.info(
        "rollout: vLLM %s, %s; %.3f GiB of weights travel in each",
        vllm.version(),
        second.describe(),
        weights.total_bytes / 2**30,
    )
    fill = partial(generator.engine.filled, weights)
    return ReshardedGenerator(generator, training=mesh, weights=fill), weights


def start_vllm(config: Config, mesh: Mesh, *, stop: StopRule) -> VllmGenerator:
    """Start an engine on the ranks of a mesh; it has no weights yet."""
    settings, dtype = config.rollout, compute_dtype(config.precision, mesh)
    options = EngineOptions(
        max_tokens=config.data.max_prompt_tokens + settings.max_response_tokens,
        slots=engine_slots(config, data=mesh.dp_size),
        cache_bytes=engine_cache_bytes(
            config, tensor=mesh.tp_size, data=mesh.dp_size, element=dtype.itemsize
        ),
        eager=settings.vllm.enforce_eager,
        prefix_caching=settings.vllm.prefix_caching,
        verify_interval=settings.vllm.verify_interval,
    )
    written = hf_config_from_model(config.model, dtype=str(dtype).removeprefix("torch."))
    engine = VllmEngine(written, dtype, mesh, options)
    return VllmGenerator(engine, mesh, stop=stop)


def warn_of_gap(config: Config, mesh: Mesh, metrics: Mapping[str, float]) -> None:
    """Warn where an engine's log-probs are too far from those of training to be rounding."""
    exact = mesh.platform.name == "cpu" and compute_dtype(config.precision, mesh) == torch.float32
    exact &= config.rollout.engine == "vllm" and not config.rollout.staleness
    gap = metrics.get("rollout/logprob_gap", 0.0)
    if exact and gap > ENGINE_GAP and mesh.rank == 0:
        logger.warning(
            "rollout/logprob_gap is %.1e, over %.0e: vLLM computes something else than the policy "
            "that trains. Compare with rollout.engine=own, and report it with the model's config.",
            gap,
            ENGINE_GAP,
        )


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
        source = (policy, mesh)
        moves: Resharder | WholeTensors = (
            WholeTensors(source, config.model, mesh, receives=False)
            if config.rollout.engine == "vllm"
            else connect_learning(source, None)
        )
        remote = RemoteTransport(moves, mesh)
        return generator_in_place(policy, config, mesh, stop=stop), remote
    generator, resharder = build_generator(policy, config, mesh, stop=stop)
    return generator, LocalTransport(generator, config, mesh, resharder=resharder)
