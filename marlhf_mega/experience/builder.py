"""Rollout + four roles -> Experience: the second phase of a PPO step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.algorithm.advantages import MacroAdvantages, macro_advantages
from marlhf_mega.algorithm.losses import sampler_weights
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.masked import masked_moments, mean_and_variance, whiten
from marlhf_mega.algorithm.rewards import (
    RunningMoments,
    kl_estimate,
    last_token_positions,
    token_rewards,
)
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.forward import forward_rows
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.experience.segmentation import Segmenter
from marlhf_mega.experience.types import Experience
from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.models.roles import LogprobStep, Roles, value_step
from marlhf_mega.parallel.collectives import sum_over_data
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rewards.combine import check_enough_valid, shape
from marlhf_mega.rewards.rule import Scores
from marlhf_mega.rollout.types import Rollout

MEANS = (
    "rollout/score_mean",
    "rollout/score_square",
    "rollout/response_tokens",
    "rollout/truncated_fraction",
    "rollout/invalid_fraction",
    "rollout/logprob_gap",
    "policy/kl",
    "policy/entropy",
    "macro/actions_per_response",
    "macro/tokens_per_action",
    "macro/fallback_fraction",
    "critic/return_mean",
    "critic/return_square",
    "critic/error_mean",
    "critic/error_square",
)
MAXIMA = ("rollout/logprob_gap_max",)


class ExperienceBuilder:
    """Scores rollouts, finds macro actions and advantages; keeps the reward's running moments."""

    def __init__(
        self, config: Config, roles: Roles, scorer: Scorer, segmenter: Segmenter, mesh: Mesh
    ) -> None:
        self.config, self.roles, self.mesh = config, roles, mesh
        self.scorer, self.segmenter = scorer, segmenter
        self.moments = RunningMoments()

    def build(
        self,
        rollout: Rollout,
        rows: Sequence[Mapping[str, Any]],
        *,
        step: int,
        kl_coef: float,
        sums: MetricSums,
    ) -> tuple[Experience, Tensor]:
        """Turn one rollout batch into experience. All ranks call it.

        Args:
            rollout: this replica's responses.
            rows: the data row of each prompt, with the prompt's text as `prompt`.
            step: of the run.
            kl_coef: current weight of the KL penalty in the reward.
            sums: takes this step's metrics.

        Returns:
            The experience, and the raw scores [batch], NaN where there is none.

        Raises:
            RuntimeError: too many responses have no score.
        """
        scores, shaped = self._scores(rollout, rows)
        old_logprobs, entropy = self._old_logprobs(rollout)
        with self.roles.offload.present("reference"):
            ref_logprobs = self._logprobs(self.roles.reference, rollout)[0]
        with self.roles.offload.present("critic"):
            values = self._forward(self.roles.critic.chunks, rollout, value_step, ())
        mask = rollout.response_mask(self.mesh.device) & scores.valid[:, None]
        actions, num_fallbacks = self.segmenter.segment(rollout, mask, ref_logprobs, step=step)
        kl = kl_estimate(old_logprobs, ref_logprobs, self.config.ppo.kl_estimator) * mask
        rewards = token_rewards(kl, shaped, last_token_positions(mask), kl_coef=kl_coef)
        outcome = self._advantages(rewards, values, actions)
        experience = Experience(
            prompts=rollout.prompts,
            responses=rollout.responses,
            actions=actions,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            old_values=values,
            advantages=self._whitened(outcome, actions)
            * self._weights(old_logprobs, rollout, actions),
            returns=outcome.token_returns,
        )
        raw = torch.where(scores.valid, scores.scores, torch.nan)
        if self.mesh.is_reporter:
            _report(sums, rollout, experience, entropy=entropy, raw=raw, fallbacks=num_fallbacks)
        return experience, raw

    def _scores(self, rollout: Rollout, rows: Sequence[Mapping[str, Any]]) -> tuple[Scores, Tensor]:
        """Return the raw scores and, [batch], what the last tokens are rewarded with."""
        with self.roles.offload.present("rewards"):
            scores = self.scorer.score(rollout, rows)
        shaped, self.moments = shape(
            scores,
            torch.tensor(rollout.finished, device=self.mesh.device),
            config=self.config.reward,
            moments=self.moments,
            sum_over_data=lambda vector: sum_over_data(vector, self.mesh),
        )
        self._check_valid(scores.valid, scores.errors)
        return scores, shaped

    def _weights(
        self, old_logprobs: Tensor, rollout: Rollout, actions: MacroActions
    ) -> Tensor | float:
        """Return what corrects for samples that another policy drew than the one that learns."""
        cap = self.config.ppo.sampler_cap
        if cap is None:
            return 1.0
        ratio = self.config.macro.ratio
        return sampler_weights(old_logprobs, rollout.logprobs, actions, ratio=ratio, cap=cap)

    def _forward(
        self,
        chunks: Sequence[torch.nn.Module],
        rollout: Rollout,
        run: Any,
        leading: tuple[int, ...],
    ) -> Tensor:
        return forward_rows(
            chunks,
            rollout.prompts,
            rollout.responses,
            mesh=self.mesh,
            limit=MicrobatchLimit.of_scoring(self.config.ppo),
            run=run,
            leading=leading,
        )

    def _old_logprobs(self, rollout: Rollout) -> tuple[Tensor, Tensor | None]:
        """Return log-probs of the policy at rollout, and entropies where the trainer finds them."""
        if self.config.ppo.old_logprobs == "sampler":
            return rollout.logprobs, None
        logprobs, entropy = self._logprobs(self.roles.policy.chunks, rollout)
        return logprobs, entropy

    def _logprobs(self, chunks: Sequence[torch.nn.Module], rollout: Rollout) -> Tensor:
        """Return [2, batch, response]: log-probs at the sampling temperature, entropies."""
        return self._forward(chunks, rollout, LogprobStep(self.config.rollout.temperature), (2,))

    def _check_valid(self, valid: Tensor, errors: Sequence[str]) -> None:
        counts = torch.tensor([float((~valid).sum()), float(len(valid))], device=self.mesh.device)
        num_invalid, num_samples = sum_over_data(counts, self.mesh).tolist()
        check_enough_valid(
            num_invalid=int(num_invalid),
            num_samples=int(num_samples),
            max_invalid_fraction=self.config.reward.max_invalid_fraction,
            errors=errors,
        )

    def _advantages(
        self, rewards: Tensor, values: Tensor, actions: MacroActions
    ) -> MacroAdvantages:
        macro, ppo = self.config.macro, self.config.ppo
        pooled_like_values = macro.compat == "ma_rlhf" or macro.reward == "mean"
        return macro_advantages(
            rewards,
            values,
            actions,
            value_rule=macro.value,
            macro_reward="mean" if pooled_like_values else "sum",
            gamma=ppo.gamma,
            gae_lambda=ppo.gae_lambda,
            discount=macro.discount,
            lambda_unit=macro.lambda_unit,
        )

    def _whitened(self, outcome: MacroAdvantages, actions: MacroActions) -> Tensor:
        """Whiten over the global batch: by tokens, or by actions if the loss is a mean of those."""
        ppo, advantages = self.config.ppo, outcome.advantages
        if not ppo.whiten_advantages or self.config.macro.compat == "ma_rlhf":
            return outcome.token_advantages
        by_action = ppo.aggregation == "macro_mean"
        weights = (actions.lengths > 0) if by_action else actions.lengths
        moments = sum_over_data(masked_moments(advantages, weights), self.mesh)
        mean, variance = mean_and_variance(moments)
        return actions.spread(whiten(advantages, weights, mean=mean, variance=variance))


def _report(
    sums: MetricSums,
    rollout: Rollout,
    experience: Experience,
    *,
    entropy: Tensor | None,
    raw: Tensor,
    fallbacks: int,
) -> None:
    """Add one replica's numbers; called on one rank of each."""
    mask = experience.actions.response_mask
    scored = raw[~raw.isnan()].double()
    kl = ((experience.old_logprobs - experience.ref_logprobs) * mask).sum(1)
    sums.add_means(
        {"rollout/score_mean": scored.sum(), "rollout/score_square": scored.square().sum()},
        count=len(scored),
    )
    lengths = torch.tensor([float(len(r)) for r in rollout.responses])
    sums.add_mean("rollout/response_tokens", lengths)
    sums.add_mean("rollout/truncated_fraction", ~torch.tensor(rollout.finished))
    sums.add_mean("rollout/invalid_fraction", raw.isnan())
    tokens = mask.sum()
    if entropy is not None:
        gap = ((experience.old_logprobs - rollout.logprobs) * mask).abs()
        sums.add_means(
            {"rollout/logprob_gap": gap.sum(), "policy/entropy": (entropy * mask).sum()},
            count=tokens,
        )
        sums.add_extreme("rollout/logprob_gap_max", gap.max())
    sums.add_means({"policy/kl": kl.sum()}, count=mask.any(1).sum())
    num_actions = (experience.actions.lengths > 0).sum()
    sums.add_means({"macro/actions_per_response": num_actions}, count=mask.any(1).sum())
    sums.add_means({"macro/tokens_per_action": tokens}, count=num_actions)
    sums.add_means({"macro/fallback_fraction": float(fallbacks)}, count=len(rollout.responses))
    error = (experience.returns - experience.old_values) * mask
    returns = experience.returns.double() * mask
    sums.add_means(
        {
            "critic/return_mean": returns.sum(),
            "critic/return_square": returns.square().sum(),
            "critic/error_mean": error.double().sum(),
            "critic/error_square": error.double().square().sum(),
        },
        count=tokens,
    )
