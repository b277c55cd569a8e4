"""PPO epochs over one experience batch: minibatches, microbatches, optimizer steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from marlhf_mega.algorithm.counter_rng import fold
from marlhf_mega.algorithm.losses import (
    LossOutput,
    entropy_loss,
    kl_loss,
    policy_loss,
    value_loss,
)
from marlhf_mega.algorithm.macro_actions import MacroActions, value_weights
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.forward import Cut, cut_rows
from marlhf_mega.experience.types import Experience
from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.roles import LogprobStep, Roles, value_step
from marlhf_mega.models.train_state import StepResult, TrainState
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import run_forward_backward
from marlhf_mega.update.skipped import keep_skipped

MEANS = (
    "policy/loss",
    "policy/clip_fraction",
    "policy/approx_kl",
    "policy/ratio",
    "policy/kl_loss",
    "policy/entropy_loss",
    "policy/grad_norm",
    "policy/lr",
    "policy/skipped_fraction",
    "critic/loss",
    "critic/clip_fraction",
    "critic/value",
    "critic/grad_norm",
    "critic/lr",
    "critic/skipped_fraction",
)

UPDATE_STREAM = 2
"""Keeps the order of minibatches apart from other draws."""


@dataclass(frozen=True, kw_only=True)
class PpoMicrobatch:
    """A few sequences and what their losses need, cut to the width of their longest response."""

    batch: SequenceBatch
    actions: MacroActions
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor


def ppo_update(
    roles: Roles,
    experience: Experience,
    config: Config,
    mesh: Mesh,
    *,
    step: int,
    sums: MetricSums,
    timers: PhaseTimers,
) -> None:
    """Run all epochs and minibatches of one PPO step. All ranks call it.

    Which samples form a minibatch was settled when prompts were dealt to the ranks
    (`local_indices`), so it does not depend on the layout.

    Args:
        roles: policy and critic are changed.
        experience: this replica's samples, minibatch after minibatch.
        config: of the run.
        mesh: where this rank stands.
        step: PPO step, from 0; the policy rests for the first `critic.warmup_ppo_steps`.
        sums: takes this step's metrics.
        timers: takes the seconds of `policy` and `critic`.
    """
    share = config.ppo.minibatch_size // mesh.dp_size
    minibatches = torch.arange(len(experience.prompts)).split(share)
    for epoch in range(config.ppo.epochs):
        keys = fold(config.run.seed, step, UPDATE_STREAM, epoch, torch.arange(len(minibatches)))
        for number in keys.argsort().tolist() if len(minibatches) > 1 else [0]:
            microbatches = make_microbatches(experience, minibatches[number], config, mesh)
            keep = partial(keep_skipped, config=config, mesh=mesh, step=step)
            with timers("critic"):
                result = update_critic(roles.critic, microbatches, config, mesh, sums=sums)
            if result.skipped:
                keep(roles.critic, _by_name(microbatches), role="critic")
            if step >= config.critic.warmup_ppo_steps:
                with timers("policy"):
                    result = update_policy(roles.policy, microbatches, config, mesh, sums=sums)
                if result.skipped:
                    keep(roles.policy, _by_name(microbatches), role="policy")
    # Until here the weights of one role have travelled while the other computed.
    roles.critic.settle()
    roles.policy.settle()


def update_policy(
    policy: TrainState,
    microbatches: Sequence[PpoMicrobatch],
    config: Config,
    mesh: Mesh,
    *,
    sums: MetricSums,
) -> StepResult:
    """Take one optimizer step on the clipped surrogate."""
    run = LogprobStep(config.rollout.temperature)
    policy.zero_grad()
    losses = run_forward_backward(
        policy.chunks,
        microbatches,
        lambda chunk, microbatch: run(chunk, microbatch.batch),
        partial(policy_objective, config=config),
    )
    result = policy.step()
    _report(sums, "policy", losses, result, mesh)
    return result


def update_critic(
    critic: TrainState,
    microbatches: Sequence[PpoMicrobatch],
    config: Config,
    mesh: Mesh,
    *,
    sums: MetricSums,
) -> StepResult:
    """Take one optimizer step on the value loss."""
    critic.zero_grad()
    losses = run_forward_backward(
        critic.chunks,
        microbatches,
        lambda chunk, microbatch: value_step(chunk, microbatch.batch),
        partial(critic_objective, config=config),
    )
    result = critic.step()
    _report(sums, "critic", losses, result, mesh)
    return result


def policy_objective(output: Tensor, microbatch: PpoMicrobatch, *, config: Config) -> LossOutput:
    """Surrogate plus, where asked for, KL and entropy terms, all over the same count.

    Args:
        output: [2, batch, response], log-probs and entropies of the policy being trained.
        microbatch: the samples.
        config: of the run.
    """
    logprobs, entropy = output
    ppo, actions = config.ppo, microbatch.actions
    loss = policy_loss(
        logprobs,
        microbatch.old_logprobs,
        microbatch.advantages,
        actions,
        ratio=config.macro.ratio,
        aggregation=ppo.aggregation,
        clip_range=ppo.clip_range,
        dual_clip=ppo.dual_clip,
    )
    total, metrics = loss.loss_sum, dict(loss.metrics)
    if ppo.kl_loss_coef:
        divergence = kl_loss(
            logprobs,
            microbatch.ref_logprobs,
            actions,
            estimator=ppo.kl_loss_estimator,
            aggregation=ppo.aggregation,
        )
        total = total + ppo.kl_loss_coef * divergence.loss_sum
        metrics["kl_loss"] = (divergence.loss_sum.detach(), divergence.count)
    if ppo.entropy_coef:
        bonus = entropy_loss(entropy, actions, aggregation=ppo.aggregation)
        total = total + ppo.entropy_coef * bonus.loss_sum
        metrics["entropy_loss"] = (bonus.loss_sum.detach(), bonus.count)
    return LossOutput(loss_sum=total, count=loss.count, metrics=metrics)


def critic_objective(output: Tensor, microbatch: PpoMicrobatch, *, config: Config) -> LossOutput:
    """Clipped squared error to the returns of the macro actions.

    Args:
        output: [batch, response] values of the critic being trained.
        microbatch: the samples.
        config: of the run.
    """
    macro, actions = config.macro, microbatch.actions
    pooled = macro.value_target == "macro"
    return value_loss(
        output,
        microbatch.old_values,
        microbatch.returns,
        actions,
        target=macro.value_target,
        pool_weights=value_weights(actions, macro.value, dtype=output.dtype) if pooled else None,
        aggregation=config.ppo.aggregation,
        clip_range=config.ppo.value_clip_range,
    )


def local_indices(batch_size: int, minibatch_size: int, mesh: Mesh) -> list[int]:
    """Deal a global batch to the data-parallel ranks so that each holds a share of every minibatch.

    Minibatch m is the m-th block of the global batch whatever the layout; this rank's samples of
    it are one slice of the block.

    Returns:
        Global sample indices of this rank, minibatch after minibatch.
    """
    share = minibatch_size // mesh.dp_size
    return [
        start + mesh.dp_rank * share + offset
        for start in range(0, batch_size, minibatch_size)
        for offset in range(share)
    ]


def make_microbatches(
    experience: Experience, rows: Tensor, config: Config, mesh: Mesh
) -> list[PpoMicrobatch]:
    """Cut a minibatch to microbatches that suit the layout.

    Args:
        experience: this replica's samples.
        rows: [minibatch] int64, which of them.
        config: of the run.
        mesh: where this rank stands.
    """
    chosen = rows.tolist()
    cuts = cut_rows(
        [experience.prompts[i] for i in chosen],
        [experience.responses[i] for i in chosen],
        limit=MicrobatchLimit.of(config.ppo),
        mesh=mesh,
    )
    return [_take(experience, rows, cut) for cut in cuts]


def _take(experience: Experience, rows: Tensor, part: Cut) -> PpoMicrobatch:
    """Return a microbatch; a row that only fills up a pipeline has no macro action."""
    batch, real = part.batch, part.rows < len(rows)
    chosen = rows[part.rows.where(real, 0)]

    def cut(values: Tensor) -> Tensor:
        return values[chosen.to(values.device), : batch.num_columns]

    ids = cut(experience.actions.ids)
    return PpoMicrobatch(
        batch=batch,
        actions=MacroActions.from_ids(ids.where(real.to(ids.device)[:, None], -1)),
        old_logprobs=cut(experience.old_logprobs),
        ref_logprobs=cut(experience.ref_logprobs),
        old_values=cut(experience.old_values),
        advantages=cut(experience.advantages),
        returns=cut(experience.returns),
    )


def _by_name(microbatches: Sequence[PpoMicrobatch]) -> dict[str, Tensor]:
    """Return all tensors of a minibatch, named by the number of their microbatch."""
    found: dict[str, Tensor] = {}
    for number, microbatch in enumerate(microbatches):
        batch = microbatch.batch
        lengths = {
            "prompt_lengths": batch.prompt_lengths,
            "response_lengths": batch.response_lengths,
        }
        tensors = {
            "tokens": batch.tokens,
            **lengths,
            "macro_action_ids": microbatch.actions.ids,
            "old_logprobs": microbatch.old_logprobs,
            "ref_logprobs": microbatch.ref_logprobs,
            "old_values": microbatch.old_values,
            "advantages": microbatch.advantages,
            "returns": microbatch.returns,
        }
        found |= {f"{number}.{name}": tensor for name, tensor in tensors.items()}
    return found


def _report(
    sums: MetricSums, role: str, losses: Sequence[LossOutput], result: StepResult, mesh: Mesh
) -> None:
    if not mesh.is_reporter:
        return
    sums.add_means({f"{role}/skipped_fraction": float(result.skipped)}, count=1)
    if result.skipped:
        return
    for loss in losses:
        sums.add_means({f"{role}/loss": loss.loss_sum}, count=loss.count)
        for name, (total, count) in loss.metrics.items():
            sums.add_means({f"{role}/{name}": total}, count=count)
    sums.add_means({f"{role}/grad_norm": result.grad_norm, f"{role}/lr": result.lr}, count=1)
