"""Offline RL on responses with known rewards: A-LoL and its family (arXiv 2305.14718).

First the advantages: a critic learns from scored greedy answers to the validation prompts what a
prompt is worth, and every training response is compared with that. Then the policy learns from
responses drawn by their advantage; its own first log-probs are the reference, computed once.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from marlhf_mega.algorithm.alol import offline_loss, sampling_probabilities
from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.checkpoint.store import newest_state
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import ExampleBuilder, OfflineExample
from marlhf_mega.data.files import Row
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.stream import SampleStream, WeightedStream
from marlhf_mega.experience.forward import cut_rows, forward_rows
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.roles import LogprobStep, value_step
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import gather_objects_over_data, share_from_first
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import run_forward_backward
from marlhf_mega.train.build import (
    build_generator,
    build_model,
    check_scalar_models,
    critic_origin,
    policy_origin,
    reward_origins,
)
from marlhf_mega.train.evaluate import Evaluator, prompt_examples
from marlhf_mega.train.inputs import Inputs, read_inputs
from marlhf_mega.train.supervised import Microbatch, SupervisedJob, train_supervised

logger = logging.getLogger(__name__)

RUN = LogprobStep(1.0)


@dataclass(frozen=True, kw_only=True)
class ValuedExample:
    """A response, what its prompt is worth, and what the first policy thinks of it."""

    example: OfflineExample
    value: float
    ref_logprobs: Tensor
    """[response] float32; zeros where the algorithm does not need them."""


@dataclass(frozen=True)
class _Known:
    """What is known of a microbatch's responses."""

    rewards: Tensor
    values: Tensor
    ref_logprobs: Tensor


def offline_inputs(config: Config, world_size: int) -> Inputs[OfflineExample]:
    """Read what offline needs; raises ValueError for anything the user has to mend."""

    def build(builder: ExampleBuilder, rows: Sequence[Row]) -> list[OfflineExample]:
        return builder.offline(rows)

    policy_origin(config)
    inputs = read_inputs(
        config,
        "offline",
        world_size=world_size,
        kind="offline",
        build=build,
        validation=("prompts", prompt_examples),
    )
    check_scalar_models(inputs.config, inputs.tokenizer, world_size, critic=True)
    return inputs


def run_offline(inputs: Inputs[OfflineExample], mesh: Mesh) -> dict[str, float]:
    """Train the policy on given responses; returns the last held-out results."""
    config, settings, tokenizer = inputs.config, inputs.config.offline, inputs.tokenizer
    policy = build_model(
        config.model, config, mesh, head="language", origin=policy_origin(config), name="policy"
    )
    scorer = Scorer(
        config.reward.source,
        [
            build_model(origin.model, config, mesh, head="scalar", origin=origin, name="reward")
            for origin in reward_origins(config, tokenizer)
        ],
        tokenizer,
        mesh,
        limit=MicrobatchLimit.of(settings),
    )
    generator, _ = build_generator(policy, config, mesh, eos_id=tokenizer.eos_id)
    evaluator = Evaluator(config, inputs.validation, tokenizer, scorer, generator, mesh)
    values, ref_logprobs = _known_before(inputs, policy, evaluator, mesh)
    values = values[:, 0]
    rewards = torch.tensor([e.reward for e in inputs.train])
    examples = [
        ValuedExample(example=e, value=value, ref_logprobs=row[: len(e.response_ids)])
        for e, value, row in zip(inputs.train, values.tolist(), ref_logprobs, strict=True)
    ]
    stream, steps = _stream(rewards - values, inputs)
    run = config.run.model_copy(update={"steps": config.run.steps or steps})
    valued: Inputs[ValuedExample] = Inputs(
        config=config.model_copy(update={"run": run}),
        tokenizer=tokenizer,
        tokenizer_path=inputs.tokenizer_path,
        train=examples,
        validation=inputs.validation,
        data_hash=inputs.data_hash,
    )

    def evaluate(state: TrainState, _: Sequence[ValuedExample]) -> Mapping[str, float]:
        return evaluator.judge([chunk.module for chunk in state.chunks], None).metrics

    spec = SupervisedJob(
        job="offline",
        role="policy",
        optimizer=config.policy,
        optimizer_prefix="policy",
        batch_size=settings.batch_size,
        cut=lambda chosen: _cut(chosen, config, mesh),
        run=RUN,
        loss=lambda output, microbatch: _loss(output, microbatch, config),
        metric_names=("advantage", "kl"),
        output_size=config.model.vocab_size or 0,
        evaluate=evaluate,
    )
    try:
        return train_supervised(spec, valued, policy, mesh, stream=stream)
    finally:
        evaluator.close()
        scorer.close()


def _known_before(
    inputs: Inputs[OfflineExample],
    policy: Sequence[StageModel],
    evaluator: Evaluator,
    mesh: Mesh,
) -> tuple[Tensor, Tensor]:
    """Return the prompts' values [rows, 1] and the reference's log-probs [rows, response].

    They are kept in `run.dir`/offline.safetensors, so that a resumed run goes on with the same. One
    that starts afresh finds them anew: what they come from may have been mended.
    """
    config, settings = inputs.config, inputs.config.offline
    file = config.run.dir / "offline.safetensors"
    resumes = config.checkpoint.resume != "never" and newest_state(config.run.dir) is not None
    if share_from_first(resumes and file.is_file(), mesh):
        with safe_open(file, framework="pt") as content:
            if content.metadata() == {"data_hash": inputs.data_hash}:
                return content.get_tensor("values"), content.get_tensor("ref_logprobs")
    num_rows, width = len(inputs.train), max(len(e.response_ids) for e in inputs.train)
    values, ref_logprobs = torch.zeros(num_rows, 1), torch.zeros(num_rows, width)
    own = torch.arange(mesh.dp_rank, num_rows, mesh.dp_size).tolist()
    prompts = [inputs.train[i].prompt_ids for i in own]
    responses = [inputs.train[i].response_ids for i in own]
    if settings.needs_values:
        critic = _learn_values(inputs, policy, evaluator, mesh)
        rows = forward_rows(
            critic.chunks,
            prompts,
            [[0]] * len(prompts),
            mesh=mesh,
            limit=MicrobatchLimit.of(settings),
            run=value_step,
        )
        _put(values, own, rows, mesh)
    if settings.needs_reference:
        rows = forward_rows(
            policy,
            prompts,
            responses,
            mesh=mesh,
            limit=MicrobatchLimit.of(settings),
            run=RUN,
            leading=(2,),
        )[0]
        _put(ref_logprobs, own, rows, mesh)
    if mesh.rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        tensors = {"values": values, "ref_logprobs": ref_logprobs}
        save_file(tensors, partial, metadata={"data_hash": inputs.data_hash})
        partial.replace(file)
    return values, ref_logprobs


def _put(target: Tensor, own: list[int], rows: Tensor, mesh: Mesh) -> None:
    """Put every replica's rows in their places; all of them get all rows."""
    for indices, part in gather_objects_over_data((own, rows.cpu()), mesh):
        if indices:
            target[indices, : part.shape[1]] = part


def _learn_values(
    inputs: Inputs[OfflineExample],
    policy: Sequence[StageModel],
    evaluator: Evaluator,
    mesh: Mesh,
) -> TrainState:
    """Let a critic learn the scores of the policy's greedy answers from the prompts alone."""
    config, settings = inputs.config, inputs.config.offline
    prompts = [p.prompt_ids for p in inputs.validation]
    scores = torch.tensor(_greedy_scores(inputs, policy, evaluator, mesh))
    scored = (~scores.isnan()).nonzero()[:, 0]
    batch_size = min(settings.batch_size, len(scored) // mesh.dp_size * mesh.dp_size)
    if batch_size == 0:
        raise RuntimeError(
            f"data.validation_path={config.data.validation_path}: must give at least one scored "
            f"answer per data-parallel rank; {len(scored)} of {len(scores)} have a score. Look at "
            "reward.source, or give more prompts."
        )
    origin = critic_origin(config, inputs.tokenizer, reward_origins(config, inputs.tokenizer))
    model = config.model if origin is None else origin.model
    chunks = build_model(model, config, mesh, head="scalar", origin=origin, name="critic")
    num_steps = settings.value_epochs * -(-len(scored) // batch_size)
    overlap = config.parallel.overlap
    critic = TrainState(chunks, config.critic, total_steps=num_steps, overlap=overlap)
    stream = SampleStream(
        num_samples=len(scored),
        batch_size=batch_size,
        seed=config.run.seed,
        shuffle=True,
        data_hash="",
    )
    for _ in range(num_steps):
        own = scored[stream.next_batch()].chunk(mesh.dp_size)[mesh.dp_rank]
        # The value of a prompt is that of the state before the first token, whichever it is.
        cuts = cut_rows(
            [prompts[i] for i in own.tolist()],
            [[0]] * len(own),
            limit=MicrobatchLimit.of(settings),
            mesh=mesh,
        )
        targets = torch.nn.functional.pad(scores[own], (0, mesh.pp_size)).to(mesh.device)
        critic.zero_grad()
        run_forward_backward(
            critic.chunks,
            [Microbatch(batch=c.batch, extra=targets[c.rows.to(mesh.device)]) for c in cuts],
            lambda chunk, m: value_step(chunk, m.batch),
            _value_loss,
        )
        critic.step()
    return critic


def _greedy_scores(
    inputs: Inputs[OfflineExample],
    policy: Sequence[StageModel],
    evaluator: Evaluator,
    mesh: Mesh,
) -> list[float]:
    """Return the score of the most likely answer to every validation prompt, NaN without one."""
    settings = inputs.config.evaluate.model_copy(
        update={"temperature": 0.0, "num_prompts": len(inputs.validation), "gold": None}
    )
    config = inputs.config.model_copy(update={"evaluate": settings})
    greedy = Evaluator(
        config,
        inputs.validation,
        inputs.tokenizer,
        evaluator.scorer,
        evaluator.generator,
        mesh,
    )
    return greedy.judge(policy, None).scores


def _value_loss(output: Tensor, microbatch: Microbatch) -> LossOutput:
    """Squared error of the prompts' values; rows that fill up a pipeline do not count."""
    real = microbatch.batch.response_mask[:, 0]
    errors = torch.where(real, output[:, 0] - microbatch.extra, 0.0)
    return LossOutput(loss_sum=errors.square().sum(), count=real.sum(), metrics={})


def _stream(
    advantages: Tensor, inputs: Inputs[OfflineExample]
) -> tuple[WeightedStream | None, int]:
    """Return what draws the training rows, and the optimizer steps of one pass over the kept."""
    config, settings = inputs.config, inputs.config.offline
    if settings.sampling == "all":
        return None, max(1, len(advantages) // settings.batch_size)
    num_kept = int((advantages > 0).sum())
    logger.info(
        "offline: %d of %d responses are better than expected, mean advantage %.4g",
        num_kept,
        len(advantages),
        advantages.mean().item(),
    )
    if num_kept == 0:
        raise RuntimeError(
            f"offline.sampling={settings.sampling}: must find a response with a positive "
            f"advantage; none of {len(advantages)} has one. Are the rewards of "
            f"{config.data.train_path} on the scale of reward.source?"
        )
    stream = WeightedStream(
        sampling_probabilities(advantages, settings.sampling),
        batch_size=settings.batch_size,
        seed=config.run.seed,
        data_hash=inputs.data_hash,
    )
    return stream, max(1, num_kept // settings.batch_size)


def _cut(chosen: Sequence[ValuedExample], config: Config, mesh: Mesh) -> list[Microbatch]:
    cuts = cut_rows(
        [c.example.prompt_ids for c in chosen],
        [c.example.response_ids for c in chosen],
        limit=MicrobatchLimit.of(config.offline),
        mesh=mesh,
    )
    pad, fillers = torch.nn.functional.pad, mesh.pp_size  # rows that only fill up a pipeline
    rewards = pad(torch.tensor([c.example.reward for c in chosen]), (0, fillers)).to(mesh.device)
    values = pad(torch.tensor([c.value for c in chosen]), (0, fillers)).to(mesh.device)
    ref_logprobs = pad_sequence([c.ref_logprobs for c in chosen], batch_first=True)
    ref_logprobs = pad(ref_logprobs, (0, 0, 0, fillers)).to(mesh.device)
    microbatches = []
    for cut in cuts:
        rows = cut.rows.to(mesh.device)
        known = _Known(rewards[rows], values[rows], ref_logprobs[rows, : cut.batch.num_columns])
        microbatches.append(Microbatch(batch=cut.batch, extra=known))
    return microbatches


def _loss(output: Tensor, microbatch: Microbatch, config: Config) -> LossOutput:
    known: _Known = microbatch.extra
    return offline_loss(
        config.offline.algorithm,
        output[0],
        known.ref_logprobs,
        microbatch.batch.response_mask,
        rewards=known.rewards,
        values=known.values,
        clip_range=config.offline.clip_range,
        kl_coef=config.offline.kl_coef,
    )
