"""What is known of preference pairs before training, and the loss that `preference.loss` names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.algorithm import preference_losses as losses
from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.config.sections.offline import PreferenceConfig
from marlhf_mega.data.datasets import PreferencePair
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.train.reference_sums import pair_batches
from marlhf_mega.train.supervised import Microbatch


@dataclass(frozen=True, kw_only=True)
class KnownPairs:
    """Columns of pairs, or of rankings of n responses; the best comes first, a filler has zeros."""

    ref_sums: Tensor
    """[pairs, n] sums of the reference's log-probs."""
    lengths: Tensor
    """[pairs, n] tokens of the responses."""
    rewards: Tensor
    """[pairs, n] of a ranking, or scores of responses that were judged in this run."""
    margins: Tensor
    """[pairs]."""
    labels: Tensor
    """[pairs] probability that the chosen response is the better one."""
    safe: Tensor
    """[pairs, 2] 1 for a response that is said to be harmless."""
    explored: Tensor
    """[pairs, 2] 1 for a response that is said to be the reference's."""
    discounts: Tensor | None = None
    """[pairs, 2, response] weights of the tokens; None where all of them are 1."""
    ref_logprobs: Tensor | None = None
    """[pairs, 2, response] of the reference, 0 on padding; only where a loss reads tokens."""

    @staticmethod
    def of(pairs: Sequence[PreferencePair], ref_sums: Tensor) -> "KnownPairs":
        """Collect what pairs say, in their order."""

        def column(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=ref_sums.dtype)

        def both(values: list[Any], size: int = 2) -> Tensor:
            return column(values).view(-1, size)

        size = ref_sums.shape[1]
        return KnownPairs(
            ref_sums=ref_sums,
            lengths=both([list(map(len, p.responses)) for p in pairs], size),
            rewards=both([p.rewards or [0.0] * size for p in pairs], size),
            margins=column([p.margin for p in pairs]),
            labels=column([p.chosen_probability for p in pairs]),
            safe=both([p.safe if len(p.safe) == 2 else [0, 0] for p in pairs]),
            explored=both([[p.from_reference == n for n in ("chosen", "rejected")] for p in pairs]),
        )

    def choose(self, indices: Tensor, device: torch.device) -> "KnownPairs":
        """Return the pairs with these numbers, [pairs] on the CPU, fillers for higher ones."""
        is_real = indices < len(self.margins)
        rows = indices.clamp(max=len(self.margins) - 1)

        def chosen(column: Tensor) -> Tensor:
            mask = is_real.view(-1, *[1] * (column.dim() - 1))
            return torch.where(mask, column[rows], 0.0).to(device)

        columns = vars(self).items()
        return KnownPairs(**{name: chosen(value) for name, value in columns if value is not None})


def pair_microbatches(
    pairs: Sequence[PreferencePair], known: KnownPairs, *, limit: MicrobatchLimit, mesh: Mesh
) -> list[Microbatch]:
    """Cut a replica's pairs, or rankings, and what is known of them into microbatches."""
    size = known.lengths.shape[1]
    parts = pair_batches(pairs, limit=limit, mesh=mesh, group=size).microbatches
    return [
        Microbatch(batch=part.batch, extra=known.choose(part.indices[::size] // size, mesh.device))
        for part in parts
    ]


def preference_output(
    logprobs: Tensor, pairs: KnownPairs, settings: PreferenceConfig
) -> LossOutput:
    """Return the loss of a microbatch.

    Args:
        logprobs: [n pairs, response] of the policy with gradient, 0 on padding; a pair's responses
            follow each other.
        pairs: what is known of them.
        settings: `preference` of the configuration.
    """
    terms, rewards = pair_terms(logprobs, pairs, settings)
    nll = _chosen_nll(logprobs, pairs)
    return losses.pair_output(terms, rewards, nll, (pairs.lengths > 0).all(1))


def pair_terms(
    logprobs: Tensor, pairs: KnownPairs, settings: PreferenceConfig
) -> tuple[Tensor, Tensor]:
    """Return each pair's loss [pairs], and the responses' implicit rewards [pairs, n].

    Arguments as of `preference_output`.
    """
    weighted = logprobs
    if pairs.discounts is not None:
        weighted = logprobs * pairs.discounts.flatten(0, 1)[:, : logprobs.shape[1]]
    sums = weighted.sum(1).view_as(pairs.lengths)
    ratios = sums - pairs.ref_sums
    if settings.length_normalize:
        ratios = ratios / pairs.lengths.clamp(min=1)
    nll = _chosen_nll(logprobs, pairs)
    lead, beta, scale = ratios[:, 0] - ratios[:, 1], settings.beta, settings.beta
    match settings.loss:
        case "dpo":
            offset = pairs.margins if settings.margin == "offset" else 0.0
            smoothing = settings.label_smoothing
            wrong = 1 - smoothing - pairs.labels * (1 - 2 * smoothing)
            terms = losses.dpo_terms(lead, beta=beta, label_smoothing=wrong, offset=offset)
        case "ipo":
            terms = losses.ipo_terms(lead, tau=beta)
        case "pro":
            ratios, scale = sums / pairs.lengths.clamp(min=1), 1.0
            nll = -((sums.shape[1] - 1) ** 2) * sums[:, 0]
            terms = losses.pro_terms(ratios, pairs.rewards)
        case "cpl":
            terms = losses.cpl_terms(*sums.unbind(1), alpha=beta, bias=settings.cpl_bias)
        case "xpo":
            explored = (sums * pairs.explored).sum(1)
            terms = losses.xpo_terms(lead, explored, beta=beta, alpha=settings.xpo_alpha)
        case "refuel":
            terms = losses.refuel_terms(lead, pairs.margins, eta=settings.refuel_eta)
            scale = 1 / settings.refuel_eta
        case "bfpo":
            factor, shift = settings.bfpo_factor, settings.bfpo_shift
            terms = losses.bfpo_terms(lead, pairs.safe, beta=beta, factor=factor, shift=shift)
        case "nash_md" | "ipo_md":
            terms = _online_terms(logprobs, lead, pairs, settings)
    if settings.margin == "weight":
        terms = terms * pairs.margins
    return terms + settings.nll_coef * nll, scale * ratios


def _online_terms(
    logprobs: Tensor, lead: Tensor, pairs: KnownPairs, settings: PreferenceConfig
) -> Tensor:
    """Of Nash-MD the policy's own response learns, which may be the better or the worse one."""
    if settings.loss == "ipo_md":
        return losses.ipo_md_terms(lead, pairs.labels, tau=settings.beta)
    assert pairs.ref_logprobs is not None
    width = logprobs.shape[1]
    own = 1 - pairs.explored
    ours, reference = (
        (grid.reshape(-1, 2, width) * own[..., None]).sum(1)
        for grid in (logprobs, pairs.ref_logprobs[..., :width])
    )
    preference = torch.where(own[:, 0] > 0, pairs.labels, 1 - pairs.labels)
    return losses.nash_md_terms(ours, reference, preference, beta=settings.beta)


def _chosen_nll(logprobs: Tensor, pairs: KnownPairs) -> Tensor:
    best = logprobs.sum(1).view_as(pairs.lengths)[:, 0]
    return -best / pairs.lengths[:, 0].clamp(min=1)
