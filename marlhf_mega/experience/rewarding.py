"""Rollout -> rewards of the last tokens: scores of responses and references, shaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.models.forward import Batches, make_batches
from marlhf_mega.models.offload import Offload
from marlhf_mega.parallel.collectives import sum_over_data
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rewards.scores import NO_SCORE, Scores
from marlhf_mega.rewards.shaping import Answers, Shaper
from marlhf_mega.rollout.types import Rollout

References = Sequence[list[list[int]]]
"""Token ids of the responses that each sample is compared with."""


@dataclass(frozen=True, kw_only=True)
class Rewarded:
    """What a replica's responses earn."""

    scores: Scores
    """Raw; valid where whatever is needed has a score."""
    shaped: Tensor
    """[batch] reward of the last token, 0 where not valid."""
    baselines: Tensor | None
    """[batch] the same of the greedy responses, if there are any."""
    compared: Tensor | None
    """[batch, count] raw scores of the references, NaN where there are fewer; None without any."""


class Rewarder:
    """Scores and shapes."""

    def __init__(self, config: Config, scorer: Scorer, mesh: Mesh, *, offload: Offload) -> None:
        self.scorer, self.mesh, self.offload = scorer, mesh, offload
        self.limit = MicrobatchLimit.of_scoring(config.ppo)
        self.shaper = Shaper(
            config.reward,
            longest=config.rollout.max_response_tokens,
            sum_over_data=partial(sum_over_data, mesh=mesh),
        )

    def reward(
        self,
        rollout: Rollout,
        batches: Batches,
        rows: Sequence[Mapping[str, Any]],
        *,
        scores: Scores | None,
        greedy: Rollout | None,
        references: References | None,
    ) -> Rewarded:
        """Score and shape this replica's responses. All ranks call it.

        Args:
            rollout: the responses.
            batches: the same for models.
            rows: the data row of each prompt.
            scores: of the responses, if they are known.
            greedy: responses to the same prompts for baselines.
            references: what `reward.shaping` compares with.
        """
        with self.offload.on_device("rewards"):
            if scores is None:
                scores = self.scorer.score(rollout.responses, batches, rows)
            compared = None
            if references is not None:
                compared = self._compared(rollout.prompts, references, rows)
                scores = _with_reference(scores, compared)
            others = None if greedy is None else self._score(greedy.prompts, greedy.responses, rows)
        shaped = self.shaper.shape(scores, self._answers(rollout, compared))
        if greedy is None or others is None:
            return Rewarded(scores=scores, shaped=shaped, baselines=None, compared=compared)
        # Without a baseline a sample fails too.
        valid, errors = scores.valid & others.valid, [*scores.errors, *others.errors]
        baselines = self.shaper.shape(
            others._replace(valid=valid), self._answers(greedy, compared), is_baseline=True
        )
        scores = scores._replace(valid=valid, errors=errors)
        return Rewarded(scores=scores, shaped=shaped, baselines=baselines, compared=compared)

    def reward_others(
        self, rollout: Rollout, rows: Sequence[Mapping[str, Any]], *, compared: Tensor | None
    ) -> Tensor:
        """Score and shape more responses as those of the batch: [batch], NaN without a score.

        Args:
            rollout: the responses.
            rows: the data row of each prompt.
            compared: [batch, count] scores of the references of each prompt, if there are any.
        """
        with self.offload.on_device("rewards"):
            scores = self._score(rollout.prompts, rollout.responses, rows)
        shaped = self.shaper.shape(scores, self._answers(rollout, compared), is_baseline=True)
        return torch.where(scores.valid, shaped, NO_SCORE)

    def _score(
        self,
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
        rows: Sequence[Mapping[str, Any]],
        *,
        judged: bool = True,
    ) -> Scores:
        batches = make_batches(prompts, responses, limit=self.limit, mesh=self.mesh)
        return self.scorer.score(responses, batches, rows, judged=judged)

    def _compared(
        self,
        prompts: Sequence[list[int]],
        references: References,
        rows: Sequence[Mapping[str, Any]],
    ) -> Tensor:
        """Score each reference of a prompt once: [batch, most], NaN where there are fewer."""
        pairs = [
            [(tuple(prompt), tuple(answer)) for answer in answers]
            for prompt, answers in zip(prompts, references, strict=True)
        ]
        row_of = {pair: row for own, row in zip(pairs, rows, strict=True) for pair in own}
        asked, answered = ([list(pair[side]) for pair in row_of] for side in (0, 1))
        found = self._score(asked, answered, list(row_of.values()), judged=False)
        scores = torch.where(found.valid, found.scores, NO_SCORE)
        place = {pair: index for index, pair in enumerate(row_of)}
        grid = scores.new_full((len(pairs), max(map(len, pairs), default=0)), NO_SCORE)
        for sample, own in enumerate(pairs):
            grid[sample, : len(own)] = scores[[place[pair] for pair in own]]
        return grid

    def _answers(self, rollout: Rollout, compared: Tensor | None) -> Answers:
        device = self.mesh.device
        return Answers(
            lengths=torch.tensor([len(r) for r in rollout.responses], device=device),
            finished=torch.tensor(rollout.finished, device=device),
            references=compared,
        )


def _with_reference(scores: Scores, compared: Tensor) -> Scores:
    """Leave out samples that have nothing to be compared with."""
    known = ~compared.isnan().all(1)
    lost = scores.valid & ~known
    errors = ["no reference response in the data row has a score"] * int(lost.sum())
    return scores._replace(valid=scores.valid & known, errors=[*scores.errors, *errors])
