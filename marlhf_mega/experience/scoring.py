"""Scores of finished responses: learned reward models, rules and servers, added by weight."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.config.schema import RewardTerm
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.experience.forward import forward_rows
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.roles import score_step
from marlhf_mega.parallel.collectives import share_in_replica
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rewards.combine import weighted_sum
from marlhf_mega.rewards.http import HttpReward
from marlhf_mega.rewards.rule import RuleReward, Scores
from marlhf_mega.rollout.types import Rollout


class Scorer:
    """Scores rollouts; owns the processes that run rules."""

    def __init__(
        self,
        terms: Sequence[RewardTerm],
        models: Sequence[Sequence[StageModel]],
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        limit: MicrobatchLimit,
        key: str = "reward.source",
    ) -> None:
        """Start the rules and open the servers, on one rank of each replica.

        Args:
            terms: the config's sources.
            models: the chunks of the learned ones, in order.
            tokenizer: turns responses into text for the rules.
            mesh: where this rank stands.
            limit: of a microbatch.
            key: the config key that error messages name.
        """
        self.terms, self.tokenizer, self.mesh, self.limit = terms, tokenizer, mesh, limit
        learned = iter(models)
        self.sources: list[Sequence[StageModel] | RuleReward | HttpReward | None] = []
        for term in terms:
            if term.is_model:
                self.sources.append(next(learned))
            elif mesh.is_replica_leader:
                self.sources.append(_open(term, key))
            else:
                self.sources.append(None)

    def score(self, rollout: Rollout, rows: Sequence[Mapping[str, Any]]) -> Scores:
        """Score every response of this replica; all its ranks get the result.

        Args:
            rollout: the responses.
            rows: the data row of each prompt, with the prompt's text as `prompt`.
        """
        parts = []
        for term, source in zip(self.terms, self.sources, strict=True):
            if isinstance(source, Sequence):
                parts.append((term.weight, self._by_model(source, rollout)))
            else:
                parts.append((term.weight, self._by_leader(source, rollout, rows)))
        return weighted_sum(parts)

    def close(self) -> None:
        """End the rules' processes."""
        for source in self.sources:
            if isinstance(source, RuleReward | HttpReward):
                source.close()

    def _by_model(self, chunks: Sequence[StageModel], rollout: Rollout) -> Scores:
        scores = last_token_scores(
            chunks,
            rollout.prompts,
            rollout.responses,
            mesh=self.mesh,
            limit=self.limit,
        )
        finite = scores.isfinite()
        errors = ["the reward model's score is not finite"] * int((~finite).sum())
        return Scores(torch.where(finite, scores, 0.0), finite, errors)

    def _by_leader(
        self,
        source: RuleReward | HttpReward | None,
        rollout: Rollout,
        rows: Sequence[Mapping[str, Any]],
    ) -> Scores:
        answer = None
        if source is not None:
            texts = [self.tokenizer.decode(ids) for ids in rollout.responses]
            answer = source.score([row["prompt"] for row in rows], texts, rows)
        scores, valid, errors = share_in_replica(answer, self.mesh)
        return Scores(scores.to(self.mesh.device), valid.to(self.mesh.device), errors)


def _open(term: RewardTerm, key: str) -> RuleReward | HttpReward:
    if term.is_server:
        return HttpReward(term.source, timeout_seconds=term.timeout_seconds)
    return RuleReward(
        term.source, timeout_seconds=term.timeout_seconds, sandbox=term.sandbox, key=key
    )


def last_token_scores(
    chunks: Sequence[torch.nn.Module],
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    *,
    mesh: Mesh,
    limit: MicrobatchLimit,
) -> Tensor:
    """Return float32 [batch]: a reward model's score at the last token of every response."""
    grid = forward_rows(
        chunks,
        prompts,
        responses,
        mesh=mesh,
        limit=limit,
        run=score_step,
    )
    last = torch.tensor([len(r) - 1 for r in responses], dtype=torch.int64, device=grid.device)
    return grid.gather(1, last[:, None])[:, 0]
