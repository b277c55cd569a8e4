"""Rollout + four roles -> Experience: the second phase of a PPO step."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.algorithm.losses import sampler_mask, sampler_weights
from marlhf_mega.algorithm.macro_actions import NO_ACTION, MacroActions, value_weights
from marlhf_mega.algorithm.policy_losses import unlikely_tokens
from marlhf_mega.algorithm.rewards import kl_estimate, last_token_positions, token_rewards
from marlhf_mega.algorithm.shaping import within_kl, without_praise
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.continuations import Continuations
from marlhf_mega.experience.estimation import estimate_advantages
from marlhf_mega.experience.passes import Passes
from marlhf_mega.experience.rewarding import References, Rewarder
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.experience.segmentation import Segmenter
from marlhf_mega.experience.types import Details, Experience
from marlhf_mega.experience.usable import without_non_finite, without_unknown
from marlhf_mega.metrics.ppo import (
    add_advantages,
    add_dense,
    add_kept,
    add_logprobs,
    add_macro_actions,
    add_masked,
    add_rollout,
    add_values,
    add_violations,
)
from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.models.forward import (
    Batches,
    logprob_forward,
    make_batches,
    run_forward,
    value_forward,
)
from marlhf_mega.models.lora import without_adapters
from marlhf_mega.models.roles import Roles
from marlhf_mega.parallel.collectives import sum_over_data
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rewards.combine import check_enough_valid
from marlhf_mega.rewards.scores import NO_SCORE, Scores
from marlhf_mega.rollout.protocol import ResponseGenerator
from marlhf_mega.rollout.types import Rollout


class ExperienceBuilder:
    """Scores rollouts, finds macro actions and advantages."""

    def __init__(
        self,
        config: Config,
        roles: Roles,
        scorer: Scorer,
        segmenter: Segmenter,
        mesh: Mesh,
        *,
        generator: ResponseGenerator | None = None,
    ) -> None:
        """Take what an experience is made with.

        Args:
            config: of the run.
            roles: the models.
            scorer: the reward.
            segmenter: finds macro actions.
            mesh: this rank's mesh.
            generator: generates with the policy; `vine` needs it.
        """
        self.config, self.roles, self.mesh = config, roles, mesh
        self.rewarder = Rewarder(config, scorer, mesh, offload=roles.offload)
        self.segmenter = segmenter
        self.continuations = None
        if config.ppo.estimator == "vine":
            assert generator is not None
            self.continuations = Continuations(config, generator, self.rewarder, mesh)

    def score(self, rollout: Rollout, rows: Sequence[Mapping[str, Any]]) -> Scores:
        """Score responses before it is settled which are trained on. All ranks call it."""
        limit = MicrobatchLimit.of_scoring(self.config.ppo)
        batches = make_batches(rollout.prompts, rollout.responses, limit=limit, mesh=self.mesh)
        with self.roles.offload.on_device("rewards"):
            return self.rewarder.scorer.score(rollout.responses, batches, rows)

    def build(
        self,
        rollout: Rollout,
        rows: Sequence[Mapping[str, Any]],
        *,
        step: int,
        kl_coef: float,
        sums: MetricSums,
        scores: Scores | None = None,
        greedy: Rollout | None = None,
        references: References | None = None,
    ) -> tuple[Experience, Details]:
        """Turn one rollout batch into experience. All ranks call it.

        Args:
            rollout: this replica's responses.
            rows: the data row of each prompt, with the prompt's text as `prompt`.
            step: of the run.
            kl_coef: current weight of the KL penalty in the reward.
            sums: takes this step's metrics.
            scores: of the responses, if `score` has found them.
            greedy: responses to the same prompts whose scores are the baselines of `remax`.
            references: responses to the same prompts that `reward.shaping` compares with.

        Returns:
            The experience and what it was made of.

        Raises:
            RuntimeError: too many responses have no score.
        """
        config, mesh = self.config, self.mesh
        batches = self._batches(rollout)
        earned = self.rewarder.reward(
            rollout, batches, rows, scores=scores, greedy=greedy, references=references
        )
        passes = self._passes(rollout, batches)
        shaped = self._within_kl(earned.shaped, passes, rollout)
        scores = without_non_finite(earned.scores, [rollout.logprobs, *passes.grids])
        mask = rollout.response_mask(mesh.device) & scores.valid[:, None]
        actions, num_fallbacks = self.segmenter.segment(rollout, mask, passes.evidence, step=step)
        tried = None
        if self.continuations is not None:
            compared = earned.compared
            tried = self.continuations.values(
                rollout, rows, actions, compared=compared, step=step, sums=sums
            )
            scores, actions, tried = without_unknown(scores, actions, tried)
            mask = actions.response_mask
        self._check_enough(scores)
        values, learned = passes.values, self._learned(passes.old_logprobs, actions)
        estimate = estimate_advantages(
            self._token_rewards(shaped, passes, mask, kl_coef=kl_coef),
            actions,
            config,
            mesh,
            values=values if tried is None else tried,
            baselines=earned.baselines,
            sample_indices=rollout.sample_indices,
            log_ratios=((passes.old_logprobs - rollout.logprobs) * mask).sum(1),
            learned=None if learned is None else learned.response_mask,
        )
        weights = self._importance_weights(passes.old_logprobs, rollout.logprobs, actions)
        advantages = estimate.advantages * weights
        if scores.holds is not None:
            advantages = without_praise(advantages, scores.holds)
        experience = Experience(
            prompts=rollout.prompts,
            responses=rollout.responses,
            actions=actions,
            old_logprobs=passes.old_logprobs,
            ref_logprobs=passes.ref_logprobs,
            old_values=values,
            advantages=advantages,
            returns=estimate.returns,
            learned=learned,
            kept=rollout.kept,
            routing=rollout.routing,
        )
        details = Details(
            scores=torch.where(scores.valid, scores.scores, NO_SCORE),
            shaped=shaped,
            kl=passes.divergence(mask),
            values=tried if values is None else self._pooled(values, actions),
        )
        if mesh.reports_metrics:
            _add_responses(sums, rollout, scores, details)
            _add_experience(sums, rollout, experience, passes, num_fallbacks)
            add_advantages(sums, advantages=estimate.unwhitened, mask=actions.response_mask)
            if config.ppo.sampler_mask is not None or learned is not None:
                counted = weights if learned is None else weights * learned.response_mask
                add_masked(sums, weights=counted, mask=actions.response_mask)
        return experience, details

    def _batches(self, rollout: Rollout) -> Batches:
        """Return the responses as microbatches for scoring, with what the sampler noted."""
        return make_batches(
            rollout.prompts,
            rollout.responses,
            limit=MicrobatchLimit.of_scoring(self.config.ppo),
            mesh=self.mesh,
            kept=rollout.kept,
            routing=rollout.routing,
        )

    def _passes(self, rollout: Rollout, batches: Batches) -> Passes:
        """Ask all models but those whose scores are known."""
        old_logprobs, full_logprobs, entropy = self._old_logprobs(rollout, batches)
        ref_logprobs = self._ref_logprobs(batches)
        return Passes(
            old_logprobs=old_logprobs,
            full_logprobs=full_logprobs,
            entropy=entropy,
            ref_logprobs=ref_logprobs,
            values=self._values(batches),
            dense=self._dense(rollout, batches, ref_logprobs),
        )

    def _within_kl(self, shaped: Tensor, passes: Passes, rollout: Rollout) -> Tensor:
        """Scale what responses earn by `reward.kl_max`, if there is one: [batch]."""
        longest = self.config.reward.kl_max
        if longest is None:
            return shaped
        divergence = passes.divergence(rollout.response_mask(self.mesh.device))
        assert divergence is not None
        # Samples whose log-probs are not finite are left out later.
        return within_kl(shaped, divergence.sum(1), longest=longest).nan_to_num()

    def _token_rewards(
        self, shaped: Tensor, passes: Passes, mask: Tensor, *, kl_coef: float
    ) -> Tensor:
        """Return what each token earns, [batch, response]."""
        # The penalty compares the two models, whatever the sampler's filters left of them.
        full, reference = passes.full_logprobs, passes.ref_logprobs
        kl = torch.zeros_like(full)
        if reference is not None:
            kl = kl_estimate(full, reference, self.config.ppo.kl_estimator) * mask
        rewards = token_rewards(kl, shaped, last_token_positions(mask), kl_coef=kl_coef)
        return rewards if passes.dense is None else rewards + passes.dense * mask

    def _ref_logprobs(self, batches: Batches) -> Tensor | None:
        """Return log-probs of the reference [batch, response], None without one."""
        if self.roles.reference is None:
            return None
        reference = self.roles.reference
        with self.roles.offload.on_device("reference"), without_adapters(reference):
            return self._logprobs(reference, batches)[0]

    def _dense(
        self, rollout: Rollout, batches: Batches, ref_logprobs: Tensor | None
    ) -> Tensor | None:
        """Return the sum of `reward.dense`, [batch, response], None without any."""
        if not self.config.reward.dense:
            return None
        temperature = self.config.rollout.temperature
        with self.roles.offload.on_device("rewards"):
            return self.rewarder.scorer.dense(
                rollout, batches, ref_logprobs=ref_logprobs, temperature=temperature
            )

    def _values(self, batches: Batches) -> Tensor | None:
        """Return the critic's values [batch, response], None without a critic."""
        if self.roles.critic is None:
            return None
        with self.roles.offload.on_device("critic"):
            return run_forward(self.roles.critic.chunks, batches, value_forward)

    def _check_enough(self, scores: Scores) -> None:
        """End the run if too few samples are left."""
        check_enough_valid(
            scores,
            max_invalid_fraction=self.config.reward.max_invalid_fraction,
            sum_over_data=partial(sum_over_data, mesh=self.mesh),
        )

    def _old_logprobs(
        self, rollout: Rollout, batches: Batches
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return log-probs of the policy at rollout, before filters too, and entropies.

        The sampler's log-probs come without entropies.
        """
        if self.config.ppo.old_logprobs == "sampler":
            return rollout.logprobs, rollout.unfiltered_logprobs, None
        filtered = rollout.kept is not None
        logprobs, entropy, *full = self._logprobs(
            self.roles.policy.chunks,
            batches,
            filtered=filtered,
            replayed=rollout.routing is not None,
        )
        return logprobs, full[0] if full else logprobs, entropy

    def _logprobs(
        self,
        chunks: Sequence[torch.nn.Module],
        batches: Batches,
        *,
        filtered: bool = False,
        replayed: bool = False,
    ) -> Tensor:
        """Return [2 or 3, batch, response] at the sampling temperature, see `logprob_forward`."""
        temperature = self.config.rollout.temperature
        forward = partial(
            logprob_forward, temperature=temperature, filtered=filtered, replayed=replayed
        )
        return run_forward(chunks, batches, forward, leading=(3 if filtered else 2,))

    def _importance_weights(
        self, old_logprobs: Tensor, sampled_logprobs: Tensor, actions: MacroActions
    ) -> Tensor:
        """Return what `ppo.tis_cap` and `ppo.sampler_mask` scale advantages by, or ones."""
        ppo, weights = self.config.ppo, torch.ones_like(old_logprobs)
        logprobs = old_logprobs, sampled_logprobs
        if ppo.tis_cap is not None:
            ratio = self.config.macro.ratio
            weights = sampler_weights(*logprobs, actions, ratio=ratio, cap=ppo.tis_cap)
        if ppo.sampler_mask is not None:
            unit, bounds = ppo.sampler_mask, ppo.sampler_bounds
            weights = weights * sampler_mask(*logprobs, actions, unit=unit, bounds=bounds)
        return weights

    def _learned(self, old_logprobs: Tensor, actions: MacroActions) -> MacroActions | None:
        """Return the tokens that `ppo.likely_mask` leaves, None for all. All ranks call it."""
        limit = self.config.ppo.likely_mask
        if limit is None:
            return None
        unlikely = unlikely_tokens(actions, old_logprobs, limit=limit)
        if not sum_over_data(unlikely.sum().float(), self.mesh) > 0:
            return None
        return MacroActions.from_ids(actions.ids.where(unlikely, NO_ACTION))

    def _pooled(self, values: Tensor, actions: MacroActions) -> Tensor:
        """Pool the critic's values over macro actions as the configuration says."""
        weights = value_weights(actions, self.config.macro.value, dtype=values.dtype)
        return actions.pool(values * weights)


def _add_responses(sums: MetricSums, rollout: Rollout, scores: Scores, details: Details) -> None:
    """Add one replica's responses and scores to the metrics."""
    lengths = [len(response) for response in rollout.responses]
    add_rollout(sums, scores=details.scores, response_lengths=lengths, finished=rollout.finished)
    if scores.holds is not None:
        add_violations(sums, holds=scores.holds, valid=scores.valid)


def _add_experience(
    sums: MetricSums,
    rollout: Rollout,
    experience: Experience,
    passes: Passes,
    num_fallbacks: int,
) -> None:
    """Add one replica's experience to the metrics; called on one rank of each replica."""
    actions = experience.actions
    mask = actions.response_mask
    add_logprobs(
        sums,
        logprobs=passes.old_logprobs,
        sampled_logprobs=rollout.logprobs,
        full_logprobs=passes.full_logprobs,
        ref_logprobs=passes.ref_logprobs,
        entropy=passes.entropy,
        mask=mask,
    )
    if rollout.kept is not None:
        old, full = passes.old_logprobs, passes.full_logprobs
        add_kept(sums, logprobs=old, full_logprobs=full, mask=mask)
    add_macro_actions(sums, lengths=actions.lengths, mask=mask, num_fallbacks=num_fallbacks)
    values, returns = experience.old_values, experience.returns
    if values is not None and returns is not None:
        add_values(sums, values=values, returns=returns, mask=mask)
    if passes.dense is not None:
        add_dense(sums, rewards=passes.dense, mask=mask)
