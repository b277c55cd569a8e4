"""Pairs that the policy gives in every step and the reward judges: Nash-MD, IPO-MD, online IPO."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.offline import PreferenceConfig
from marlhf_mega.data.datasets import PreferencePair, Prompt
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.evaluation import prompt_row
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.metrics.held_out import HeldOut
from marlhf_mega.models.forward import Batches, Forward, logprob_forward, run_forward
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.lora import without_adapters
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import sum_over_data
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.rewards.combine import check_enough_valid
from marlhf_mega.rewards.scores import Scores
from marlhf_mega.rollout.protocol import ResponseGenerator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.train.build import build_model
from marlhf_mega.train.generation import build_evaluator, generator_in_place
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.origins import policy_origin
from marlhf_mega.train.preference_pairs import KnownPairs, pair_microbatches, preference_output
from marlhf_mega.train.reference_sums import pair_batches
from marlhf_mega.train.supervised import Microbatch, SupervisedJob, train_supervised


def run_online(inputs: Inputs[Prompt], mesh: Mesh, watchdog: Watchdog) -> dict[str, float]:
    """Train the policy on pairs that it gives itself; returns the last held-out results."""
    config, settings = inputs.config, inputs.config.preference
    limit = MicrobatchLimit(sequences=2 * settings.microbatch_size, packed=bool(settings.packing))
    policy, evaluator = build_evaluator(inputs, mesh, limit=limit, learns=True)
    assert evaluator.scorer is not None
    reference = policy  # with adapters, its frozen weights are those that it began with
    if not config.model.lora.is_on:
        start = policy_origin(config)
        reference = build_model(
            config.model, config, mesh, origin=start, name="reference", frozen=True
        )
    second = reference if settings.mixture else ()
    stop = StopRule.of(inputs.tokenizer)
    forward = partial(logprob_forward, temperature=config.rollout.temperature)
    answering = Answering(
        config,
        generator_in_place(policy, config, mesh, stop=stop, second=second),
        evaluator.scorer,
        reference,
        forward,
        mesh,
        limit,
    )

    def evaluate(state: TrainState, _: Sequence[Prompt]) -> HeldOut:
        return evaluator.judge([chunk.module for chunk in state.chunks], reference).results

    names = ("accuracy", "margin", "nll", "chosen_reward", "rejected_reward", "score", "win_rate")
    spec = SupervisedJob(
        job="preference",
        role="policy",
        optimizer=config.policy,
        batch_size=settings.batch_size,
        respond=answering.pairs,
        cut=lambda answered: pair_microbatches(*answered, limit=limit, mesh=mesh),
        forward=forward,
        loss=lambda output, microbatch: online_loss(output, microbatch, settings),
        metric_names=names,
        output_size=config.model.vocab_size or 0,
        evaluate=evaluate,
    )
    try:
        return train_supervised(spec, inputs, policy, mesh, watchdog)
    finally:
        evaluator.close()


@dataclass(frozen=True)
class Answering:
    """Answers prompts twice, by the policy and its opponent, and has the pairs judged."""

    config: Config
    generator: ResponseGenerator
    scorer: Scorer
    reference: Sequence[StageModel]
    """To be run `without_adapters`."""
    forward: Forward
    """Gives log-probs at the temperature of the rollout."""
    mesh: Mesh
    limit: MicrobatchLimit

    def pairs(
        self, prompts: Sequence[Prompt], step: int
    ) -> tuple[list[PreferencePair], KnownPairs]:
        """Return this replica's pairs, the response that the judge prefers first.

        The opponent's response counts as the reference's; a pair without a score has no tokens, so
        that no loss counts it. All ranks call it.

        Args:
            prompts: this replica's share of the step, which follow each other in the whole.
            step: of the run.

        Raises:
            RuntimeError: too many responses have no score.
        """
        given = self._generate(prompts, step)
        batches = pair_batches(given, limit=self.limit, mesh=self.mesh)
        scores = self._scores(prompts, given, batches)
        grid, valid = scores.scores.view(-1, 2).cpu(), scores.valid.view(-1, 2).all(1).cpu()
        best = (grid[:, 1] > grid[:, 0]).long()
        order = torch.stack((best, 1 - best), 1)
        grid = grid.gather(1, order)
        probability = torch.sigmoid(grid[:, 0] - grid[:, 1])
        pairs = [
            replace(
                pair,
                chosen_ids=pair.responses[first],
                rejected_ids=pair.responses[1 - first],
                chosen_probability=preferred,
                from_reference=("rejected", "chosen")[first],
                rewards=rewards,
            )
            for pair, first, preferred, rewards in zip(
                given, best.tolist(), probability.tolist(), grid.tolist(), strict=True
            )
        ]
        logprobs = self._ref_logprobs(batches).view(len(pairs), 2, -1).cpu()
        logprobs = logprobs.gather(1, order[..., None].expand_as(logprobs))
        known = KnownPairs.of(pairs, logprobs.sum(2))
        lengths = known.lengths * valid[:, None]
        return pairs, replace(known, lengths=lengths, ref_logprobs=logprobs)

    def _generate(self, prompts: Sequence[Prompt], step: int) -> list[PreferencePair]:
        """Draw two responses to each prompt, those of samples 2 i and 2 i + 1 of the step."""
        config, settings = self.config, self.config.preference
        opponent = SamplingRule(temperature=config.rollout.temperature, mixture=settings.mixture)
        own = opponent if settings.loss == "ipo_md" else replace(opponent, mixture=0.0)
        first = self.mesh.dp_rank * len(prompts)
        sides = [
            self.generator.generate(
                [prompt.prompt_ids for prompt in prompts],
                [2 * (first + i) + side for i in range(len(prompts))],
                replace(RolloutOptions.of(config, step=step), rule=rule),
            ).responses
            for side, rule in enumerate((own, opponent))
        ]
        return [
            PreferencePair(prompt_ids=p.prompt_ids, chosen_ids=a, rejected_ids=b, margin=0.0)
            for p, a, b in zip(prompts, *sides, strict=True)
        ]

    def _scores(
        self, prompts: Sequence[Prompt], pairs: Sequence[PreferencePair], batches: Batches
    ) -> Scores:
        rows = [prompt_row(prompt) for prompt in prompts for _ in range(2)]
        responses = [response for pair in pairs for response in pair.responses]
        scores = self.scorer.score(responses, batches, rows)
        check_enough_valid(
            scores,
            max_invalid_fraction=self.config.reward.max_invalid_fraction,
            sum_over_data=partial(sum_over_data, mesh=self.mesh),
        )
        return scores

    def _ref_logprobs(self, batches: Batches) -> Tensor:
        """Return [2 pairs, response], 0 on padding."""
        with without_adapters(self.reference):
            return run_forward(self.reference, batches, self.forward, leading=(2,))[0]


def online_loss(output: Tensor, microbatch: Microbatch, settings: PreferenceConfig) -> LossOutput:
    """Return the loss of `preference.loss`, and what the judge says."""
    known: KnownPairs = microbatch.extra
    logprobs = torch.where(microbatch.batch.response_mask, output[0], 0.0)
    loss = preference_output(logprobs, known, settings)
    counts = (known.lengths > 0).all(1)
    wins = torch.where(known.explored[:, 0] > 0, 1 - known.labels, known.labels)
    columns = {"score": known.rewards.mean(1), "win_rate": wins}
    judged: dict[str, Any] = {
        name: ((column * counts).sum(), loss.count) for name, column in columns.items()
    }
    return replace(loss, metrics={**loss.metrics, **judged})
