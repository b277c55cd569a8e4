"""Supervised fine-tuning: token-mean cross entropy on the responses only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from marlhf_mega.algorithm.losses import sft_loss
from marlhf_mega.data.datasets import SupervisedExample
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.metrics.held_out import HeldOut, interleave
from marlhf_mega.models.forward import (
    Batches,
    IndexedBatch,
    logprob_forward,
    make_batches,
    run_forward,
)
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.train.build import build_model
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.origins import policy_origin
from marlhf_mega.train.supervised import Microbatch, SupervisedJob, train_supervised


def run_sft(inputs: Inputs[SupervisedExample], mesh: Mesh, watchdog: Watchdog) -> dict[str, float]:
    """Fine-tune the policy on demonstrations; returns the last held-out results."""
    config = inputs.config
    origin = policy_origin(config)
    chunks = build_model(config.model, config, mesh, origin=origin, name="policy")

    def batches(examples: Sequence[SupervisedExample]) -> Batches:
        return make_batches(
            [e.prompt_ids for e in examples],
            [e.response_ids for e in examples],
            limit=MicrobatchLimit.of(config.sft),
            mesh=mesh,
        )

    def cut(examples: Sequence[SupervisedExample]) -> list[Microbatch]:
        # An interleaved pipeline may add fillers.
        learned = torch.nn.functional.pad(_learned_mask(examples), (0, 0, 0, mesh.pp_size))

        def mask(part: IndexedBatch) -> Tensor:
            return learned[part.indices, : part.batch.num_columns].to(mesh.device)

        parts = batches(examples).microbatches
        return [Microbatch(batch=part.batch, extra=mask(part)) for part in parts]

    def evaluate(state: TrainState, examples: Sequence[SupervisedExample]) -> HeldOut:
        own = examples[mesh.dp_rank :: mesh.dp_size]
        logprobs, _ = run_forward(state.chunks, batches(own), logprob_forward, leading=(2,))
        learned = _learned_mask(own).to(mesh.device)
        losses = -(logprobs.double() * learned).sum(1)
        own_tokens = learned.sum(1).tolist()
        parts = gather_objects(((losses / learned.sum(1)).tolist(), own_tokens), mesh.groups.dp)
        return HeldOut(
            values={"eval/loss": interleave([losses for losses, _ in parts])},
            weights=interleave([tokens for _, tokens in parts]),
            exponentials={"eval/perplexity": "eval/loss"},
        )

    spec = SupervisedJob(
        job="sft",
        role="policy",
        optimizer=config.policy,
        batch_size=config.sft.batch_size,
        cut=cut,
        forward=logprob_forward,
        loss=lambda output, microbatch: sft_loss(output[0], microbatch.extra),
        metric_names=(),
        output_size=config.model.vocab_size or 0,
        evaluate=evaluate,
    )
    return train_supervised(spec, inputs, chunks, mesh, watchdog)


def _learned_mask(examples: Sequence[SupervisedExample]) -> Tensor:
    """Return bool [batch, response], True on the tokens that the assistant wrote."""
    longest = max([1, *(len(e.response_ids) for e in examples)])
    mask = torch.zeros(len(examples), longest, dtype=torch.bool)
    for row, example in zip(mask, examples, strict=True):
        row[: len(example.response_ids)] = True
        spans = zip(example.unlearned[::2], example.unlearned[1::2], strict=True)
        for start, end in spans:
            row[start:end] = False
    return mask
