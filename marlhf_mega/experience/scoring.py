"""Scores of finished responses: learned reward models, rules and servers, combined."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.rewards import log_ratio_rewards, segment_rewards
from marlhf_mega.algorithm.termination import sentence
from marlhf_mega.config.sections.reward import RewardConfig, RewardSource
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.models.forward import (
    Batches,
    last_token_scores,
    logprob_forward,
    make_batches,
    run_forward,
    score_forward,
)
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.collectives import share_in_replica, sum_over_data
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rewards.combine import combine, constrain
from marlhf_mega.rewards.http import HttpReward
from marlhf_mega.rewards.rule import RuleReward
from marlhf_mega.rewards.scores import Scores
from marlhf_mega.rewards.template import fill_template
from marlhf_mega.rollout.types import Rollout


class Scorer:
    """Scores rollouts; owns the processes that run rules."""

    def __init__(
        self,
        config: RewardConfig,
        models: Sequence[Sequence[StageModel]],
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        key: str | None = None,
    ) -> None:
        """Start the rules and open the servers, on one rank of each replica.

        Args:
            config: the `reward` section.
            models: the chunks of the learned judges, in order.
            tokenizer: turns responses into text for the rules.
            mesh: this rank's mesh.
            key: the config key that error messages name, if it is another one.
        """
        self.config, self.tokenizer, self.mesh = config, tokenizer, mesh
        self.terms = config.source
        learned = iter(models)
        self.sources: list[Sequence[StageModel] | RuleReward | HttpReward | None] = []
        for judge in config.judges:
            if judge.is_model:
                self.sources.append(next(learned))
            elif mesh.is_replica_leader:
                self.sources.append(_open(judge, key or judge.key))
            else:
                self.sources.append(None)

    def score(
        self,
        responses: Sequence[list[int]],
        batches: Batches,
        rows: Sequence[Mapping[str, Any]],
        *,
        judged: bool = True,
    ) -> Scores:
        """Score every response of this replica; all its ranks get the result.

        Args:
            responses: token ids.
            batches: the same with their prompts, for learned reward models.
            rows: the data row of each prompt, with the prompt's text as `prompt`.
            judged: whether to ask the constraints too.
        """
        parts, constraints = [], self.config.constraints if judged else ()
        scored = [*self.terms, *constraints]
        for judge, source in zip(scored, self.sources, strict=False):
            if not isinstance(source, Sequence):
                parts.append(self._by_leader(source, responses, rows))
            elif judge.template is None:
                parts.append(_known(last_token_scores(source, batches)))
            else:
                parts.append(self._by_template(judge, source, responses, rows, batches))
        count = len(self.terms)
        over_data = partial(sum_over_data, mesh=self.mesh)
        scores = combine(parts[:count], self.config, sum_over_data=over_data)
        thresholds = [constraint.threshold for constraint in constraints]
        return constrain(scores, list(zip(thresholds, parts[count:], strict=True)))

    def dense(
        self,
        rollout: Rollout,
        batches: Batches,
        *,
        ref_logprobs: Tensor | None,
        temperature: float,
    ) -> Tensor:
        """Return the sum of the dense rewards, [batch, response], 0 on padding.

        Args:
            rollout: this replica's responses.
            batches: the same for models.
            ref_logprobs: [batch, response] of the reference, for `rto`.
            temperature: of `ref_logprobs`, and so of what they are compared with.
        """
        mask = rollout.response_mask(self.mesh.device)
        total = torch.zeros(mask.shape, device=self.mesh.device)
        models = self.sources[len(self.sources) - len(self.config.dense) :]
        for term, chunks in zip(self.config.dense, models, strict=True):
            assert isinstance(chunks, Sequence)
            if term.kind == "rto":
                assert ref_logprobs is not None
                forward = partial(logprob_forward, temperature=temperature)
                logprobs = run_forward(chunks, batches, forward, leading=(2,))[0]
                total += log_ratio_rewards(
                    logprobs, ref_logprobs, weight=term.weight, clip=term.clip
                )
            else:
                scores = run_forward(chunks, batches, score_forward)
                segments = self._segments(term.kind, rollout, mask)
                total += segment_rewards(scores, segments, weight=term.weight, clip=term.clip)
        return total

    def _segments(
        self, kind: Literal["sentence", "clause"], rollout: Rollout, mask: Tensor
    ) -> MacroActions:
        tokenizer = self.tokenizer
        flags = tokenizer.ends_sentence if kind == "sentence" else tokenizer.ends_clause()
        ends = torch.zeros_like(mask)
        ids = torch.tensor([t for r in rollout.responses for t in r], device=mask.device)
        ends[mask] = flags.to(mask.device)[ids]
        finished = torch.tensor(rollout.finished, device=mask.device)
        return MacroActions.from_starts(sentence(mask, ends, ends_with_eos=finished), mask)

    def close(self) -> None:
        """End the rules' processes."""
        for source in self.sources:
            if isinstance(source, RuleReward | HttpReward):
                source.close()

    def _by_template(
        self,
        judge: RewardSource,
        chunks: Sequence[StageModel],
        responses: Sequence[list[int]],
        rows: Sequence[Mapping[str, Any]],
        batches: Batches,
    ) -> Scores:
        """Score rendered texts by a reward model, or by what a language model answers.

        The latter is log p(first answer | text) - log p(second answer | text).
        """
        texts = [self.tokenizer.response_text(ids) for ids in responses]
        rendered, errors = fill_template(judge, texts, rows)
        known = torch.tensor([text is not None for text in rendered], device=self.mesh.device)
        asked = self._encoded([text or "." for text in rendered])
        limit = replace(batches.limit, tokens=None, packed=False)
        if judge.answers is None:
            parts = [ids[:-1] for ids in asked], [ids[-1:] for ids in asked]
            found = _known(
                last_token_scores(chunks, make_batches(*parts, limit=limit, mesh=self.mesh))
            )
        else:
            yes, no = self.tokenizer.encode_batch(judge.answers)
            count = len(asked)
            both = make_batches(
                [*asked, *asked], [yes] * count + [no] * count, limit=limit, mesh=self.mesh
            )
            logprobs = run_forward(chunks, both, logprob_forward, leading=(2,))[0].sum(1)
            found = _known(logprobs[:count] - logprobs[count:])
        valid = found.valid & known
        return Scores(torch.where(valid, found.scores, 0.0), valid, [*found.errors, *errors])

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts with control tokens, and what the tokenizer puts in front of every text."""
        first = self.tokenizer.prompt_prefix
        encoded = self.tokenizer.encode_batch(texts)
        return [ids if ids[: len(first)] == first else [*first, *ids] for ids in encoded]

    def _by_leader(
        self,
        source: RuleReward | HttpReward | None,
        responses: Sequence[list[int]],
        rows: Sequence[Mapping[str, Any]],
    ) -> Scores:
        answer = None
        if source is not None:
            texts = [self.tokenizer.response_text(ids) for ids in responses]
            answer = source.score([row["prompt"] for row in rows], texts, rows)
        found, device = share_in_replica(answer, self.mesh), self.mesh.device
        return Scores(found.scores.to(device), found.valid.to(device), found.errors)


def _known(scores: Tensor) -> Scores:
    finite = scores.isfinite()
    errors = ["the reward model's score is not finite"] * int((~finite).sum())
    return Scores(torch.where(finite, scores, 0.0), finite, errors)


def _open(judge: RewardSource, key: str) -> RuleReward | HttpReward:
    if judge.is_server:
        return HttpReward(judge.source, timeout_seconds=judge.timeout_seconds)
    return RuleReward(
        judge.source, timeout_seconds=judge.timeout_seconds, sandbox=judge.sandbox, key=key
    )
