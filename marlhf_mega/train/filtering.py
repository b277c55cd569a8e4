"""`rollout.filter`: score what is generated, choose what is trained on, and move it there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from marlhf_mega.algorithm import filters
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.experience.evaluation import prompt_row
from marlhf_mega.parallel.collectives import gather_objects, share_in_replica
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.rewards.combine import check_enough_valid
from marlhf_mega.rewards.scores import Scores
from marlhf_mega.rollout.assignment import balance, gather_rollouts, local_indices, select
from marlhf_mega.rollout.types import Rollout
from marlhf_mega.train.rollouts import Rollouts

Score = Callable[[Rollout, Sequence[Mapping[str, Any]]], Scores]
"""Scores this replica's responses; all ranks call it."""


class Chosen(NamedTuple):
    """What one replica trains on."""

    prompts: list[Prompt]
    rollout: Rollout
    """Numbered anew: `sample_indices` are places in the batch that is trained on."""
    scores: Scores


class RolloutFilter:
    """Chooses the samples of each step. All ranks call it and choose the same.

    Everything is decided from the scores of the whole batch, on every rank, so that the choice does
    not depend on the layout. The prompts that `dynamic` consumes beyond a batch are the data
    stream's next, whose place is in every checkpoint.
    """

    def __init__(
        self, config: Config, rollouts: Rollouts, score: Score, mesh: Mesh, watchdog: Watchdog
    ) -> None:
        """Take what brings new samples, and what scores them."""
        self.config, self.mesh = config, mesh
        self._rollouts, self._score, self._watchdog = rollouts, score, watchdog
        self.metrics: dict[str, float] = {}
        """Of the last step, the same on all ranks."""
        self.own_lengths: tuple[list[int], list[int]] = [], []
        """Tokens of the prompts and responses that this replica had in the last step, before the
        filter."""

    def choose(self, step: int, prompts: Sequence[Prompt], rollout: Rollout) -> Chosen:
        """Return this replica's part of what is trained on.

        Args:
            step: of the run.
            prompts: of this replica's first samples.
            rollout: these samples.

        Raises:
            RuntimeError: too many responses have no score.
        """
        self.own_lengths = [], []
        found = _Generated(self.mesh)
        self._add(found, prompts, rollout)
        order, tries = self._replaced(found, step)
        check_enough_valid(
            Scores(found.scores, found.valid, found.errors),
            max_invalid_fraction=self.config.reward.max_invalid_fraction,
            sum_over_data=lambda counts: counts,  # they are those of all replicas
        )
        kept = order[self._kept(found.scores[order], found.valid[order], step)]
        distinct = kept.unique().numel()
        self.metrics = {
            "rollout/kept_fraction": distinct / len(found.scores),
            "rollout/distinct_samples": float(distinct),
            "rollout/generation_tries": float(tries),
        }
        if found.valid.any():
            self.metrics["rollout/unfiltered_score"] = found.scores[found.valid].mean().item()
        return self._chosen(found, kept)

    def _add(self, found: "_Generated", prompts: Sequence[Prompt], rollout: Rollout) -> None:
        """Score this replica's new samples; add them and those of the others."""
        self.own_lengths[0].extend(map(len, rollout.prompts))
        self.own_lengths[1].extend(map(len, rollout.responses))
        scores = self._score(rollout, [prompt_row(prompt) for prompt in prompts])
        found.add(prompts, rollout, scores)

    def _replaced(self, found: "_Generated", step: int) -> tuple[Tensor, int]:
        """Return the samples of the batch, and how often they were generated.

        `dynamic`: other prompts replace those whose responses score alike.
        """
        settings = self.config.rollout
        size = settings.samples_per_prompt
        groups, tries = torch.arange(settings.batch_size).view(-1, size), 1
        while settings.filter == "dynamic" and tries < settings.filter_tries:
            order = groups.flatten()
            spread = filters.has_spread(
                found.scores[order], found.valid[order], samples_per_prompt=size
            )
            alike = (~spread).nonzero()[:, 0]
            if not len(alike):
                break
            self._watchdog.enter("rollout")
            first = len(found.scores)
            self._add(found, *self._rollouts.more(step, len(alike), first=first))
            groups[alike] = torch.arange(first, len(found.scores)).view(-1, size)
            tries += 1
        return groups.flatten(), tries

    def _kept(self, scores: Tensor, valid: Tensor, step: int) -> Tensor:
        """Return places in the batch of what is trained on."""
        settings, seed = self.config.rollout, self.config.run.seed
        judged, size = (scores, valid), settings.samples_per_prompt
        match settings.filter:
            case "pf_ppo":
                power = settings.filter_power
                return filters.power_resample(*judged, power=power, seed=seed, step=step)
            case "best_worst":
                return filters.best_worst(*judged, samples_per_prompt=size)
            case "best_random":
                return filters.best_random(*judged, samples_per_prompt=size, seed=seed, step=step)
            case "best_of_n":
                return filters.best_of_n(*judged, samples_per_prompt=size)
        return torch.arange(len(scores))

    def _chosen(self, found: "_Generated", kept: Tensor) -> Chosen:
        """Return this replica's part of [trained] samples."""
        ppo = self.config.ppo
        places = local_indices(len(kept), ppo.minibatch_size, self.mesh)
        rollout = select(found.parts, kept[places].tolist(), self.mesh.device)
        rollout = replace(rollout, sample_indices=places)
        if ppo.microbatch_tokens is not None:
            rollout = balance(rollout, minibatch_size=ppo.minibatch_size, mesh=self.mesh)
        samples = kept[rollout.sample_indices]
        device = self.mesh.device
        values, valid, holds = (
            each[samples].to(device) for each in (found.scores, found.valid, found.holds)
        )
        scores = Scores(values, valid, [], holds if self.config.reward.constraints else None)
        prompts = [found.prompts[sample] for sample in samples.tolist()]
        return Chosen(prompts, rollout, scores)


class _Generated:
    """All samples of a step, of all replicas and tries, by their global index."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self.parts: list[Rollout] = []
        self.prompts: dict[int, Prompt] = {}
        self.scores = torch.zeros(0)
        self.valid = self.holds = torch.zeros(0, dtype=torch.bool)
        self.errors: list[str] = []
        """Of this replica."""

    def add(self, prompts: Sequence[Prompt], rollout: Rollout, scores: Scores) -> None:
        """Add this replica's new samples, and those of the others."""
        self.errors += scores.errors
        holds = scores.valid if scores.holds is None else scores.holds
        here = torch.stack([scores.scores, scores.valid.float(), holds.float()]).cpu()
        # All ranks of a replica must choose alike, to the last bit.
        judged = share_in_replica(here, self._mesh)
        everyone = gather_objects((list(prompts), judged), self._mesh.groups.dp)
        rollouts = gather_rollouts(rollout, self._mesh)
        order = torch.tensor([i for part in rollouts for i in part.sample_indices]).argsort()
        new = torch.cat([judged for _, judged in everyone], 1)[:, order]
        self.scores = torch.cat([self.scores, new[0]])
        self.valid = torch.cat([self.valid, new[1].bool()])
        self.holds = torch.cat([self.holds, new[2].bool()])
        self.parts += rollouts
        for part, (found, _) in zip(rollouts, everyone, strict=True):
            self.prompts |= zip(part.sample_indices, found, strict=True)
