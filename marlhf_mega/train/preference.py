"""Learning from preference pairs without a reward model: DPO and its relatives."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.algorithm.preference_losses import held_out_columns, segment_discounts
from marlhf_mega.data.datasets import PreferencePair
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.segmentation import Segmenter, TokenEvidence
from marlhf_mega.metrics.held_out import HeldOut, interleave
from marlhf_mega.models.forward import logprob_forward, run_forward
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.train.build import build_model
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.online_pairs import run_online
from marlhf_mega.train.origins import policy_origin, reference_origin
from marlhf_mega.train.preference_pairs import (
    KnownPairs,
    pair_microbatches,
    pair_terms,
    preference_output,
)
from marlhf_mega.train.reference_sums import pair_batches, reference_sums
from marlhf_mega.train.supervised import Microbatch, SupervisedJob, train_supervised


def run_preference(
    inputs: Inputs[PreferencePair], mesh: Mesh, watchdog: Watchdog
) -> dict[str, float]:
    """Train the policy on preference pairs; returns the last held-out results."""
    config, settings = inputs.config, inputs.config.preference
    if settings.is_online:
        return run_online(cast(Inputs[Any], inputs), mesh, watchdog)
    size = settings.num_responses
    limit = MicrobatchLimit(
        sequences=size * settings.microbatch_size, packed=bool(settings.packing)
    )
    chunks = build_model(config.model, config, mesh, origin=policy_origin(config), name="policy")
    train, held_out = _pairs(inputs, chunks, mesh, watchdog, limit)

    def cut(rows: Sequence[int]) -> list[Microbatch]:
        return pair_microbatches(*train.take(rows), limit=limit, mesh=mesh)

    def loss(output: Tensor, microbatch: Microbatch) -> LossOutput:
        logprobs = torch.where(microbatch.batch.response_mask, output[0], 0.0)
        return preference_output(logprobs, microbatch.extra, settings)

    def evaluate(state: TrainState, rows: Sequence[int]) -> HeldOut:
        pairs, known = held_out.take(rows[mesh.dp_rank :: mesh.dp_size])
        batches = pair_batches(pairs, limit=limit, mesh=mesh, group=size)
        logprobs, _ = run_forward(state.chunks, batches, logprob_forward, leading=(2,))
        known = known.choose(torch.arange(len(pairs)), mesh.device)
        columns = held_out_columns(*pair_terms(logprobs, known, settings))
        found = {f"eval/{name}": column.tolist() for name, column in columns.items()}
        parts = gather_objects(found, mesh.groups.dp)
        return HeldOut(values={name: interleave([part[name] for part in parts]) for name in found})

    rows: Inputs[Any] = inputs
    rows = replace(rows, train=range(len(inputs.train)), validation=range(len(inputs.validation)))
    spec = SupervisedJob(
        job="preference",
        role="policy",
        optimizer=config.policy,
        batch_size=settings.batch_size,
        cut=cut,
        forward=logprob_forward,
        loss=loss,
        metric_names=("accuracy", "margin", "nll", "chosen_reward", "rejected_reward"),
        output_size=config.model.vocab_size or 0,
        evaluate=evaluate,
    )
    return train_supervised(spec, rows, chunks, mesh, watchdog)


@dataclass(frozen=True)
class _Pairs:
    """The pairs of a file, and what is known of them."""

    examples: Sequence[PreferencePair]
    known: KnownPairs
    segmenter: Segmenter | None
    """None where responses are not cut into macro actions."""
    gamma: float

    def take(self, rows: Sequence[int]) -> tuple[list[PreferencePair], KnownPairs]:
        """Return some pairs, and what is known of them, on the CPU."""
        pairs = [self.examples[i] for i in rows]
        known = self.known.choose(torch.tensor(rows, dtype=torch.int64), torch.device("cpu"))
        if self.segmenter is not None and pairs:
            known = replace(known, discounts=_discounts(pairs, rows, self.segmenter, self.gamma))
        return pairs, known


def _pairs(
    inputs: Inputs[PreferencePair],
    policy: Sequence[StageModel],
    mesh: Mesh,
    watchdog: Watchdog,
    limit: MicrobatchLimit,
) -> tuple[_Pairs, _Pairs]:
    """Return the training and the validation pairs.

    The policy is not yet trained, so it is the reference unless another model is named; that one
    is gone when this returns.
    """
    config, settings = inputs.config, inputs.config.preference
    reference, origin = policy, reference_origin(config, inputs.tokenizer)
    if origin is not None and origin != policy_origin(config):
        reference = build_model(
            origin.model, config, mesh, origin=origin, name="reference", frozen=True
        )
    segmenter = None
    if settings.has_actions:
        segmenter = Segmenter(config.macro, inputs.tokenizer, mesh, seed=config.run.seed)

    def known(pairs: Sequence[PreferencePair]) -> _Pairs:
        sums = torch.zeros(len(pairs), settings.num_responses)
        if len(pairs) and settings.needs_reference:
            sums = reference_sums(pairs, reference, mesh, watchdog, limit=limit, config=config)
        return _Pairs(pairs, KnownPairs.of(pairs, sums), segmenter, settings.gamma)

    found = known(inputs.train), known(inputs.validation)
    watchdog.enter(None)
    return found


def _discounts(
    pairs: Sequence[PreferencePair], rows: Sequence[int], segmenter: Segmenter, gamma: float
) -> Tensor:
    """Cut a replica's responses into macro actions; returns weights [pairs, 2, response].

    A response is cut in the same way whenever it is seen.
    """
    responses = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    indices = [2 * row + place for row in rows for place in range(2)]
    nothing = torch.zeros(len(responses), 1)  # the rules that read evidence are refused
    evidence = TokenEvidence(old_logprobs=nothing, ref_logprobs=nothing, entropy=None)
    actions, _ = segmenter.segment_given(responses, indices, evidence)
    return segment_discounts(actions, gamma).view(len(pairs), 2, -1).cpu()
