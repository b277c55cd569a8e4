"""Generate on held-out prompts and judge: reward score, gold rule, KL from a reference."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.reward import RewardConfig, RewardTerm
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.experience.samples import make_sample
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.metrics.diversity import diversity
from marlhf_mega.metrics.held_out import (
    GOLD,
    SCORE,
    HeldOut,
    best_of_groups,
    interleave,
    means_of_groups,
)
from marlhf_mega.metrics.writers import Sample
from marlhf_mega.models.forward import Batches, logprob_forward, make_batches, run_forward
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.lora import without_adapters
from marlhf_mega.models.offload import Offload
from marlhf_mega.parallel.collectives import gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rewards.scores import NO_SCORE, Scores
from marlhf_mega.rollout.protocol import ResponseGenerator
from marlhf_mega.rollout.types import Rollout, RolloutOptions

logger = logging.getLogger(__name__)

EVALUATION_STEP = 1 << 40
"""Held-out prompts are always answered with the same draws, so that steps can be compared."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Held-out results of all ranks, in the order of the prompts."""

    results: HeldOut
    scores: list[float]
    """Raw scores of all responses, NaN where there is none."""
    samples: list[Sample]


class Evaluator:
    """Judges a policy on the first `evaluate.num_prompts` held-out prompts."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        scorer: Scorer | None,
        generator: ResponseGenerator,
        mesh: Mesh,
        *,
        limit: MicrobatchLimit,
        offload: Offload | None = None,
    ) -> None:
        """Take what generates and what judges.

        Args:
            config: of the run.
            prompts: held-out prompts.
            tokenizer: of the run.
            scorer: the reward; None means that there is none.
            generator: generates with the policy.
            mesh: this rank's mesh.
            limit: of a microbatch of scores and log-probs.
            offload: brings reference and reward models to the device.
        """
        self.offload = offload or Offload()
        self.config, self.tokenizer, self.mesh, self.scorer = config, tokenizer, mesh, scorer
        self.limit = limit
        self.generator = generator
        self.prompts = list(prompts[: config.evaluate.num_prompts])
        gold = config.evaluate.gold if self.prompts else None
        self.gold = (
            None
            if gold is None
            else Scorer(
                RewardConfig(source=(RewardTerm(source=gold),)),
                [],
                tokenizer,
                mesh,
                key="evaluate.gold",
            )
        )

    def judge(self, chunks: Sequence[StageModel], reference: Sequence[StageModel] | None) -> Judged:
        """Generate and judge. All ranks call it.

        Args:
            chunks: the policy that the generator generates with.
            reference: for the KL; none: no KL.
        """
        mesh, settings = self.mesh, self.config.evaluate
        group = settings.samples_per_prompt
        own = list(range(mesh.dp_rank, group * len(self.prompts), mesh.dp_size))
        prompts = [self.prompts[i // group] for i in own]
        slots = max(1, settings.batch_size // self.generator.mesh.dp_size)
        options = RolloutOptions.of(self.config, step=EVALUATION_STEP, slots=slots)
        rule = replace(options.rule, temperature=settings.temperature)
        rollout = self.generator.generate(
            [prompt.prompt_ids for prompt in prompts], own, replace(options, rule=rule)
        )
        rows = [prompt_row(prompt) for prompt in prompts]
        batches = make_batches(rollout.prompts, rollout.responses, limit=self.limit, mesh=mesh)
        with self.offload.on_device("rewards"):
            scores = self._scores(self.scorer, rollout, batches, rows)
        with self.offload.on_device("reference"):
            divergence = self._divergence(chunks, reference, batches)
        columns = {
            SCORE: _known(scores),
            GOLD: _known(self._scores(self.gold, rollout, batches, rows)),
            "eval/violation_fraction": _violations(scores),
            "eval/kl": divergence,
            "eval/response_tokens": torch.tensor([float(len(r)) for r in rollout.responses]),
            "eval/truncated_fraction": torch.tensor([float(not f) for f in rollout.finished]),
        }
        values = {name: column.tolist() for name, column in columns.items() if column is not None}
        return self._combine(gather_objects((values, rollout.responses), mesh.groups.dp))

    def close(self) -> None:
        """End the processes of the rules that judge."""
        for scorer in (self.scorer, self.gold):
            if scorer is not None:
                scorer.close()

    def _scores(
        self,
        scorer: Scorer | None,
        rollout: Rollout,
        batches: Batches,
        rows: Sequence[Mapping[str, Any]],
    ) -> Scores | None:
        if scorer is None or not scorer.terms:
            return None
        scores = scorer.score(rollout.responses, batches, rows)
        if scores.errors and self.mesh.is_replica_leader:
            what = "gold" if scorer is self.gold else "reward"
            reason, _ = Counter(scores.errors).most_common(1)[0]
            count = int((~scores.valid).sum())
            logger.warning(
                "%d of %d held-out responses have no %s score: %s", count, len(rows), what, reason
            )
        return scores

    def _divergence(
        self,
        chunks: Sequence[StageModel],
        reference: Sequence[StageModel] | None,
        batches: Batches,
    ) -> Tensor | None:
        """Return [batch]: the sum over tokens of log p / p_reference, at the same temperature."""
        if reference is None:
            return None
        temperature = self.config.evaluate.temperature or 1.0
        forward = partial(logprob_forward, temperature=temperature)
        logprobs = run_forward(chunks, batches, forward, leading=(2,))[0]
        with without_adapters(reference):
            ref_logprobs = run_forward(reference, batches, forward, leading=(2,))[0]
        return (logprobs - ref_logprobs).sum(1)

    def _combine(self, parts: list[tuple[dict[str, list[float]], list[list[int]]]]) -> Judged:
        """Put the results of all replicas into the order of the prompts."""
        names = parts[0][0]
        values = {name: interleave([columns[name] for columns, _ in parts]) for name in names}
        responses = interleave([responses for _, responses in parts])
        nothing = [NO_SCORE] * len(responses)
        scores, golds = (values.get(name, nothing) for name in (SCORE, GOLD))
        group = self.config.evaluate.samples_per_prompt
        prompts = [prompt.prompt for prompt in self.prompts for _ in range(group)]
        samples = [
            make_sample(index, prompt, ids, self.tokenizer, score=score, gold=gold)
            for index, (prompt, ids, score, gold) in enumerate(
                zip(prompts, responses, scores, golds, strict=True)
            )
        ]
        if self.config.evaluate.best_of_n:
            values = {name: best_of_groups(x, scores, group) for name, x in values.items()}
        else:
            values = {name: means_of_groups(column, group) for name, column in values.items()}
        across: dict[str, float] = {}
        if group > 1:
            ends, texts = self.tokenizer.end_ids, None
            if self.config.evaluate.self_bleu:
                texts = [self.tokenizer.response_text(ids) for ids in responses]
            tokens = [ids[:-1] if ids and ids[-1] in ends else ids for ids in responses]
            each, across = diversity(tokens, texts, group)
            values |= each
        return Judged(
            results=HeldOut(
                values=values,
                statistics=across,
                contest=SCORE if SCORE in values else None,
            ),
            scores=scores,
            samples=samples,
        )


def _known(scores: Scores | None) -> Tensor | None:
    return None if scores is None else torch.where(scores.valid, scores.scores, NO_SCORE)


def _violations(scores: Scores | None) -> Tensor | None:
    if scores is None or scores.holds is None:
        return None
    return torch.where(scores.valid, (~scores.holds).float(), NO_SCORE)


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """Return the data row with the prompt as text, as rules get it."""
    return {**prompt.row, "prompt": prompt.prompt}
