"""ODIN's second head: correlations of the scores with the length, over the whole batch.

A correlation is no sum over microbatches. So the scores of the batch are computed once without
gradients; the penalty's gradient with respect to each of them is exact, and the microbatches then
add it to the loss as a term that is linear in their scores. The result does not depend on the
layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.algorithm.reward_models import correlation, head_overlap, odin_penalty
from marlhf_mega.config.sections.training import RewardModelConfig
from marlhf_mega.models.forward import both_scores_forward
from marlhf_mega.models.gpt import ScalarHead
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import pipeline_forward
from marlhf_mega.train.reward_pairs import PairTargets, pair_loss
from marlhf_mega.train.supervised import Microbatch

LENGTH_METRICS = ("length_correlation", "length_head_correlation", "head_overlap")


@dataclass(frozen=True)
class LengthTargets:
    """What the loss of a microbatch needs beside the scores."""

    pairs: PairTargets
    penalty: float
    """Of the whole batch."""
    slopes: Tensor
    """[2, sequences]: its derivatives by the scores of the two heads."""
    num_pairs: int
    """Of the whole batch."""
    correlations: tuple[float, float]
    """Of the length with the scores of each head, in the whole batch."""


def add_length_terms(
    state: TrainState, microbatches: Sequence[Microbatch], *, mesh: Mesh
) -> list[Microbatch]:
    """Add what the length penalty of the whole batch asks of each score. All ranks call it.

    Args:
        state: the reward model, with a length head.
        microbatches: of this rank, as `pair_microbatch` makes them.
        mesh: this rank's mesh.

    Returns:
        Microbatches for `two_head_loss`; as they were on stages that compute no loss.
    """
    batches = [microbatch.batch for microbatch in microbatches]
    outputs = pipeline_forward(state.chunks, batches, both_scores_forward)
    if not outputs:
        return list(microbatches)
    scores = [b.at_last(grid).double() for b, grid in zip(batches, outputs, strict=True)]
    lengths = torch.cat([(b.prompt_lengths + b.response_lengths).double() for b in batches])
    own = torch.cat((torch.cat(scores, dim=1), lengths[None]))
    parts = gather_objects(own.cpu(), mesh.groups.dp)
    *both, of_all = torch.cat(parts, dim=1)
    leaves = [head.requires_grad_() for head in both]
    penalty = odin_penalty(of_all, *leaves)
    slopes = torch.stack(torch.autograd.grad(penalty, leaves))
    first = sum(part.shape[1] for part in parts[: mesh.dp_rank])
    share = slopes[:, first : first + own.shape[1]].to(own.device, torch.float32)
    quality, length = (correlation(of_all, head.detach()).item() for head in both)
    return [
        replace(
            microbatch,
            extra=LengthTargets(
                pairs=microbatch.extra,
                penalty=penalty.item(),
                slopes=part,
                num_pairs=len(of_all) // 2,
                correlations=(quality, length),
            ),
        )
        for microbatch, part in zip(
            microbatches, share.split([s.shape[1] for s in scores], dim=1), strict=True
        )
    ]


def two_head_loss(
    output: Tensor,
    microbatch: Microbatch,
    settings: RewardModelConfig,
    head: ScalarHead,
    *,
    adds_overlap: bool,
) -> LossOutput:
    """Compare pairs by the sum of both scores, and keep length out of the first (ODIN).

    Args:
        output: [2, batch, response] scores.
        microbatch: as `add_length_terms` returned it.
        settings: the weights of the terms.
        head: of the model, whose weights should be orthogonal.
        adds_overlap: whether the gradient of that term is this rank's to add: of ranks that share
            each sequence, one does.
    """
    targets: LengthTargets = microbatch.extra
    pairs = pair_loss(output.sum(0), replace(microbatch, extra=targets.pairs), settings)
    linear = (targets.slopes * microbatch.batch.at_last(output)).sum() * targets.num_pairs
    overlap = head_overlap(head.weight.float(), head.length_weight.float())
    overlap = overlap if adds_overlap else overlap.detach()
    # The linear term has the gradient of the penalty, and takes no part in its value.
    penalty = pairs.count * targets.penalty + linear - linear.detach()
    loss_sum = pairs.loss_sum + settings.length_coef * penalty
    loss_sum = loss_sum + settings.overlap_coef * pairs.count * overlap
    quality, length = targets.correlations
    metrics = {
        "length_correlation": (pairs.count * quality, pairs.count),
        "length_head_correlation": (pairs.count * length, pairs.count),
        "head_overlap": (pairs.count * overlap.detach(), pairs.count),
    }
    return LossOutput(loss_sum=loss_sum, count=pairs.count, metrics=pairs.metrics | metrics)
