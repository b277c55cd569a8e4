"""Offline RL on responses with known rewards: A-LoL and its family (arXiv 2305.14718).

First the advantages: a head on a frozen model learns from scored greedy answers to the validation
prompts what a prompt is worth, and every training response is compared with that. Then the policy
learns from responses drawn by their advantage; its own first log-probs are the reference, computed
once.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from marlhf_mega import durable
from marlhf_mega.algorithm.alol import offline_loss, sampling_probabilities
from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.data import show_sources
from marlhf_mega.data.datasets import OfflineExample
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.stream import WeightedStream
from marlhf_mega.metrics.held_out import HeldOut
from marlhf_mega.models.forward import logprob_forward, make_batches
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.train.generation import build_evaluator
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.offline_known import Known, known_before
from marlhf_mega.train.supervised import Microbatch, SupervisedJob, train_supervised

logger = logging.getLogger(__name__)


def run_offline(inputs: Inputs[OfflineExample], mesh: Mesh, watchdog: Watchdog) -> dict[str, float]:
    """Train the policy on given responses; returns the last held-out results."""
    config, settings = inputs.config, inputs.config.offline
    limit = MicrobatchLimit.of(settings)
    policy, evaluator = build_evaluator(inputs, mesh, limit=limit, learns=True)
    known = known_before(inputs, policy, evaluator, mesh, watchdog)
    watchdog.enter(None)
    probabilities = None
    if settings.sampling != "all":
        probabilities = sampling_probabilities(known.rewards - known.values, settings.sampling)
    if settings.needs_values and mesh.rank == 0:
        _write_advantages(inputs, known, probabilities)
    stream, steps = _stream(inputs, known, probabilities)
    if settings.sampling == "all_priority" and settings.compat == "lol_rl":
        chosen = known.rewards[::2]
        known = replace(known, rewards=chosen.repeat_interleave(2))
    run = config.run.model_copy(update={"steps": config.run.steps or steps})
    rows: Inputs[Any] = inputs
    rows = replace(
        rows, config=config.model_copy(update={"run": run}), train=range(len(inputs.train))
    )

    def evaluate(state: TrainState, _: Sequence[int]) -> HeldOut:
        return evaluator.judge([chunk.module for chunk in state.chunks], None).results

    spec = SupervisedJob(
        job="offline",
        role="policy",
        optimizer=config.policy,
        batch_size=settings.batch_size,
        cut=lambda chosen: valued_microbatches(inputs.train, chosen, known, config, mesh),
        forward=logprob_forward,
        loss=lambda output, microbatch: valued_loss(output, microbatch, config),
        metric_names=("advantage", "kl") if settings.needs_reference else ("advantage",),
        output_size=config.model.vocab_size or 0,
        evaluate=evaluate,
    )
    try:
        return train_supervised(spec, rows, policy, mesh, watchdog, stream=stream)
    finally:
        evaluator.close()


def _write_advantages(
    inputs: Inputs[OfflineExample], known: Known, probabilities: Tensor | None
) -> None:
    """Write to `run.dir`/advantages.jsonl what each row of the data is worth."""
    sources = inputs.config.data.train_path or ()
    files = [file for source in sources for file in source.files()]
    of_rows = chain.from_iterable(
        [file] * part.num_samples for file, part in zip(files, inputs.parts, strict=True)
    )
    rows = zip(of_rows, inputs.train, known.values.tolist(), strict=True)
    lines = [
        {
            "file": file,
            "line": example.line,
            "reward": example.reward,
            "value": value,
            "advantage": example.reward - value,
        }
        for file, example, value in rows
    ]
    if probabilities is not None:
        for line, probability in zip(lines, probabilities.tolist(), strict=True):
            line["probability"] = probability
    with durable.replacing(inputs.config.run.dir / "advantages.jsonl") as partial:
        write_jsonl(partial, lines)


def _stream(
    inputs: Inputs[OfflineExample], known: Known, probabilities: Tensor | None
) -> tuple[WeightedStream | None, int]:
    """Return what draws the training rows, and the optimizer steps of all passes over the kept."""
    config, settings = inputs.config, inputs.config.offline
    epochs = config.run.epochs or 1
    if probabilities is None:
        return None, max(1, epochs * inputs.epoch_size // settings.batch_size)
    num_kept = int((probabilities > 0).sum())
    logger.info(
        "offline: %d of %d responses are better than expected, mean advantage %.4g",
        num_kept,
        len(probabilities),
        (known.rewards - known.values).mean().item(),
    )
    if num_kept == 0:
        raise RuntimeError(
            f"offline.sampling={settings.sampling}: must find a response with a positive "
            f"advantage; none of {len(probabilities)} has one. Are the rewards of "
            f"{show_sources(config.data.train_path)} on the scale of reward.source?"
        )
    stream = WeightedStream(
        probabilities,
        batch_size=settings.batch_size,
        seed=config.run.seed,
        data_hash=inputs.data_hash,
    )
    return stream, max(1, epochs * num_kept // settings.batch_size)


def valued_microbatches(
    examples: Sequence[OfflineExample],
    chosen: Sequence[int],
    known: Known,
    config: Config,
    mesh: Mesh,
) -> list[Microbatch]:
    """Cut a rank's share of a batch into microbatches that suit the layout.

    Args:
        examples: all of them.
        chosen: which are this rank's.
        known: of all examples.
        config: of the run.
        mesh: this rank's mesh.
    """
    batches = make_batches(
        [examples[row].prompt_ids for row in chosen],
        [examples[row].response_ids for row in chosen],
        limit=MicrobatchLimit.of(config.offline),
        mesh=mesh,
    )
    rows = torch.tensor(chosen)
    found = []
    for part in batches.microbatches:
        real = part.indices < len(rows)
        taken = rows[part.indices.where(real, 0)]
        width, device = part.batch.num_columns, mesh.device
        extra = known.take(taken, real=real, width=width, device=device)
        found.append(Microbatch(batch=part.batch, extra=extra))
    return found


def valued_loss(output: Tensor, microbatch: Microbatch, config: Config) -> LossOutput:
    """Return the loss of `offline.algorithm`; its KL is a metric only with a reference."""
    known: Known = microbatch.extra
    loss = offline_loss(
        config.offline.algorithm,
        output[0],
        known.ref_logprobs,
        microbatch.batch.response_mask,
        rewards=known.rewards,
        values=known.values,
        actions=MacroActions.from_ids(known.action_ids),
        clip_range=config.offline.clip_range,
        kl_coef=config.offline.kl_coef,
        compat=config.offline.compat,
    )
    if config.offline.needs_reference:
        return loss
    metrics = {name: value for name, value in loss.metrics.items() if name != "kl"}
    return replace(loss, metrics=metrics)
