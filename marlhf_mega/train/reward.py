"""Reward-model training: Bradley-Terry on preference pairs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor

from marlhf_mega import durable
from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.algorithm.reward_models import correlation
from marlhf_mega.config.limits import round_up
from marlhf_mega.config.sections.training import RewardModelConfig
from marlhf_mega.data.datasets import PreferencePair
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.microbatch import MicrobatchLimit, split_by_size
from marlhf_mega.metrics.held_out import SCORE, HeldOut, interleave
from marlhf_mega.metrics.pairs import HELD_OUT_PAIRS, JudgedPair, calibration_error, source_names
from marlhf_mega.models.forward import (
    Forward,
    both_scores_forward,
    last_state_forward,
    last_token_scores,
    make_batches,
    score_forward,
)
from marlhf_mega.models.gpt import ScalarHead, StageModel
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.train.build import build_model
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.length_head import LENGTH_METRICS, add_length_terms, two_head_loss
from marlhf_mega.train.moving_labels import MovingLabels
from marlhf_mega.train.origins import policy_origin
from marlhf_mega.train.reward_pairs import PAIR_METRICS, pair_loss, pair_microbatch
from marlhf_mega.train.supervised import Microbatch, SupervisedJob, train_supervised
from marlhf_mega.train.user_latents import LATENT_METRICS, UserLatents


def run_reward(inputs: Inputs[PreferencePair], mesh: Mesh, watchdog: Watchdog) -> dict[str, float]:
    """Train a reward model, usually from the fine-tuned policy; returns held-out results."""
    config = inputs.config
    settings = config.reward_model
    origin = policy_origin(config)
    short = source_names(sorted(set(inputs.validation_sources)))
    sources = [short[path] for path in inputs.validation_sources]
    chunks = build_model(
        config.model,
        config,
        mesh,
        origin=origin,
        name="reward",
        length_head=settings.length_coef > 0,
        latent_size=settings.latent_size,
    )
    users = None
    if settings.latent_size:
        users = UserLatents(chunks, settings, mesh, seed=config.run.seed)

    def lay_out(pairs: Sequence[PreferencePair]) -> Microbatch:
        if users is not None:
            return users.microbatch(pairs)
        return pair_microbatch(pairs, mesh, packed=bool(settings.packing))

    def cut(pairs: Sequence[PreferencePair]) -> list[Microbatch]:
        lengths = [len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs]
        size, stages = settings.microbatch_size, mesh.pp_size if mesh.num_chunks > 1 else 1
        count = round_up(-(-len(pairs) // size), stages)
        parts = split_by_size(lengths, microbatch_size=size, min_microbatches=count)
        return [lay_out([pairs[i] for i in part.tolist()]) for part in parts]

    def score(state: TrainState, own: Sequence[PreferencePair]) -> Tensor:
        if users is not None:
            return users.score(state, own).double()
        prompts = [p.prompt_ids for p in own]
        limit = MicrobatchLimit(
            sequences=2 * settings.microbatch_size, packed=bool(settings.packing)
        )
        scores = [
            last_token_scores(
                state.chunks, make_batches(prompts, responses, limit=limit, mesh=mesh)
            )
            for responses in ([p.chosen_ids for p in own], [p.rejected_ids for p in own])
        ]
        return torch.stack(scores).double()

    def evaluate(state: TrainState, pairs: Sequence[PreferencePair]) -> HeldOut:
        share = slice(mesh.dp_rank, None, mesh.dp_size)
        own = pairs[share]
        found, judged = _held_out(own, sources[share], score(state, own), mesh)
        if mesh.rank == 0:
            with durable.replacing(config.run.dir / HELD_OUT_PAIRS) as partial:
                write_jsonl(partial, map(asdict, judged))
        return found

    labels = None
    if settings.label_update:
        labels = MovingLabels(inputs.train, score, mesh, rate=settings.label_update)
        inputs = replace(inputs, train=labels)

    head = _head(chunks, settings, mesh, users)
    spec = SupervisedJob(
        job="reward",
        role="reward",
        optimizer=settings,
        batch_size=settings.batch_size,
        cut=cut,
        forward=head.forward,
        loss=head.loss,
        prepare=head.prepare,
        metric_names=(*PAIR_METRICS, *head.metrics),
        output_size=1,
        evaluate=evaluate,
        labels=labels,
    )
    return train_supervised(spec, inputs, chunks, mesh, watchdog)


@dataclass(frozen=True)
class _Head:
    """What the head of a reward model changes of the job."""

    forward: Forward
    loss: Callable[[Tensor, Microbatch], LossOutput]
    prepare: Callable[[TrainState, list[Microbatch]], list[Microbatch]] | None = None
    metrics: tuple[str, ...] = ()


def _head(
    chunks: Sequence[StageModel],
    settings: RewardModelConfig,
    mesh: Mesh,
    users: UserLatents | None,
) -> _Head:
    if users is not None:
        return _Head(last_state_forward, users.loss, users.prepare, LATENT_METRICS)
    if settings.length_coef == 0:
        return _Head(score_forward, partial(pair_loss, settings=settings))

    def loss(output: Tensor, microbatch: Microbatch) -> LossOutput:
        head, is_first = chunks[-1].output_layer, mesh.cp_rank == 0
        assert isinstance(head, ScalarHead)
        return two_head_loss(output, microbatch, settings, head, adds_overlap=is_first)

    return _Head(both_scores_forward, loss, partial(add_length_terms, mesh=mesh), LENGTH_METRICS)


def _held_out(
    pairs: Sequence[PreferencePair], sources: Sequence[str], scores: Tensor, mesh: Mesh
) -> tuple[HeldOut, list[JudgedPair]]:
    """Judge the pairs of all replicas by the scores of this one, [chosen and rejected, pairs]."""
    own = [
        JudgedPair(
            chosen_score=chosen,
            rejected_score=rejected,
            chosen_tokens=len(pair.chosen_ids),
            rejected_tokens=len(pair.rejected_ids),
            margin=pair.margin,
            chosen_probability=pair.chosen_probability,
            source=source,
        )
        for pair, source, chosen, rejected in zip(pairs, sources, *scores.tolist(), strict=True)
    ]
    judged = interleave(gather_objects(own, mesh.groups.dp))
    lead = torch.tensor([pair.lead for pair in judged], dtype=torch.float64)
    label = torch.tensor([pair.chosen_probability for pair in judged], dtype=torch.float64)
    both = torch.tensor(
        [[pair.chosen_score, pair.rejected_score] for pair in judged], dtype=torch.float64
    )
    lengths = torch.tensor([[pair.chosen_tokens, pair.rejected_tokens] for pair in judged])
    loss = torch.nn.functional.softplus(-lead) + (1 - label) * lead
    columns = {"eval/accuracy": (lead > 0).double(), "eval/margin": lead, "eval/loss": loss}
    values = {name: column.tolist() for name, column in columns.items()}
    values[SCORE] = both.mean(1).tolist()
    if len(names := {pair.source for pair in judged}) > 1:
        for name in sorted(names):
            values[f"eval/accuracy/{name}"] = [
                float(pair.lead > 0) if pair.source == name else math.nan for pair in judged
            ]
    statistics = {
        "eval/calibration_error": calibration_error(judged),
        "eval/length_correlation": correlation(lengths.double().flatten(), both.flatten()).item(),
    }
    return HeldOut(values=values, statistics=statistics), judged
