"""Preference pairs as microbatches of a reward model, and their loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlhf_mega.algorithm.losses import LossOutput, preference_loss, preference_span_loss
from marlhf_mega.config.sections.training import RewardModelConfig
from marlhf_mega.data.datasets import PreferencePair
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.train.supervised import Microbatch

PAIR_METRICS = ("accuracy", "margin", "score", "score_square")


@dataclass(frozen=True)
class PairTargets:
    """What the loss of a microbatch needs beside the scores, [pairs] each."""

    margin: Tensor
    chosen_probability: Tensor

    def label(self, settings: RewardModelConfig) -> Tensor:
        """Return the probabilities that the chosen responses are better, labels' errors included.

        Of a certain label `label_smoothing` is the probability that it is wrong.
        """
        wrong = settings.label_smoothing
        return self.chosen_probability * (1 - 2 * wrong) + wrong


def pair_microbatch(pairs: Sequence[PreferencePair], mesh: Mesh, *, packed: bool) -> Microbatch:
    """Lay out pairs: first all chosen responses, then all rejected ones."""
    prompts = [p.prompt_ids for p in pairs]
    batch = SequenceBatch.create(
        prompts * 2,
        [p.chosen_ids for p in pairs] + [p.rejected_ids for p in pairs],
        multiple=mesh.sequence_multiple,
        context_multiple=mesh.context_multiple,
        device=mesh.device,
        packed=packed,
    )
    targets = PairTargets(
        margin=torch.tensor([p.margin for p in pairs], device=mesh.device),
        chosen_probability=torch.tensor([p.chosen_probability for p in pairs], device=mesh.device),
    )
    return Microbatch(batch=batch, extra=targets)


def pair_loss(output: Tensor, microbatch: Microbatch, settings: RewardModelConfig) -> LossOutput:
    """Compare the scores [batch, response] of a pair's two responses, as the config says."""
    batch: SequenceBatch = microbatch.batch
    targets: PairTargets = microbatch.extra
    if settings.loss == "last":
        return last_loss(batch.at_last(output), targets, settings)
    chosen, rejected = output.chunk(2)
    tokens = batch.to_grid(batch.response_tokens).chunk(2)
    masks = batch.response_mask.chunk(2)
    return preference_span_loss(
        chosen,
        rejected,
        chosen_tokens=tokens[0],
        rejected_tokens=tokens[1],
        chosen_mask=masks[0],
        rejected_mask=masks[1],
        margin=targets.margin,
        chosen_probability=targets.label(settings),
        center_coef=settings.center_coef,
    )


def last_loss(scores: Tensor, targets: PairTargets, settings: RewardModelConfig) -> LossOutput:
    """Compare the scores of last tokens [2 * pairs], those of chosen responses first."""
    chosen, rejected = scores.chunk(2)
    return preference_loss(
        chosen,
        rejected,
        margin=targets.margin,
        chosen_probability=targets.label(settings),
        center_coef=settings.center_coef,
    )
