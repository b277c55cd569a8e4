"""PPO epochs over one experience batch: minibatches, microbatches, optimizer steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from marlhf_mega.algorithm.counter_rng import fold
from marlhf_mega.algorithm.losses import (
    LossOutput,
    entropy_loss,
    kl_loss,
    over_budget,
    policy_loss,
    value_loss,
)
from marlhf_mega.algorithm.macro_actions import NO_ACTION, MacroActions, value_weights
from marlhf_mega.algorithm.policy_losses import cispo_loss, p3o_loss, pg_loss
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.types import Experience
from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.models.adapter_dropout import dropping
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.forward import (
    Forward,
    IndexedBatch,
    logprob_forward,
    make_batches,
    value_forward,
)
from marlhf_mega.models.roles import Roles
from marlhf_mega.models.routing import drain
from marlhf_mega.models.train_state import StepResult, TrainState
from marlhf_mega.parallel.collectives import sum_over_data
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import pipeline_forward_backward
from marlhf_mega.update.metrics import add_optimizer_step
from marlhf_mega.update.skipped import keep_skipped

UPDATE_STREAM = 2
"""Keeps the order of minibatches apart from other draws."""


@dataclass(frozen=True, kw_only=True)
class PpoMicrobatch:
    """A few sequences and what their losses need, cut to the width of their longest response."""

    batch: SequenceBatch
    actions: MacroActions
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    old_values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    learned: MacroActions | None = None
    """Those tokens of `actions` that the policy learns from; None means all."""


PER_TOKEN = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
"""Tensors [batch, response] of an experience that losses need, besides the macro actions; without a
critic or a reference some are None."""


NOT_TAKEN = StepResult(grad_norm=0.0, lr=0.0, skipped=True)
"""The result of a step on a minibatch in which no sample counts."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A model that an update changes, and the loss that it learns by."""

    role: str
    state: TrainState
    forward: Forward
    objective: Callable[[Tensor, PpoMicrobatch], LossOutput]


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

    Old log-probs and values were computed without `model.lora.dropout`, and here adapters drop
    inputs: the ratio of the first minibatch is then not 1, but noisy around it.

    Args:
        roles: the policy and, if there is one, the critic are changed.
        experience: this replica's samples, minibatch after minibatch.
        config: of the run.
        mesh: this rank's mesh.
        step: PPO step, from 0; only the critic learns in the first `ppo.critic_only_steps`.
        sums: takes this step's metrics.
        timers: takes the seconds of `policy` and `critic`.
    """
    learning = [] if roles.critic is None else [critic_learner(roles.critic, config)]
    if step >= config.ppo.critic_only_steps:
        policy = policy_learner(
            roles.policy,
            config,
            filtered=experience.kept is not None,
            replayed=experience.routing is not None,
        )
        learning.append(policy)
    parts = minibatches(len(experience.prompts), config, mesh, step=step)
    for number, samples in enumerate(parts):
        if not _any_counts(experience, samples, mesh):
            # Adam would move the weights by what it remembers of earlier gradients.
            for learner in learning:
                if mesh.reports_metrics:
                    add_optimizer_step(sums, [], NOT_TAKEN, role=learner.role)
            continue
        microbatches = make_microbatches(experience, samples, config, mesh)
        for learner in learning:
            state = learner.state
            of_pass = config.run.seed, step, number, int(learner.role == "policy")
            with timers(learner.role), dropping(state.chunks, *of_pass):
                state.zero_grad()
                losses = pipeline_forward_backward(
                    state.chunks, microbatches, learner.forward, learner.objective
                )
                result = state.step()
            if mesh.reports_metrics:
                add_optimizer_step(sums, losses, result, role=learner.role)
            if result.skipped:
                tensors = _by_name(microbatches)
                keep_skipped(state.num_skipped, tensors, config, mesh, role=learner.role, step=step)
    if (counts := drain(roles.policy.chunks)) is not None:
        # Every rank has layers of its own, and tokens.
        sums.add_means({"policy/routing_differs": counts[0]}, count=counts[1])
    # Until here the weights of one role have travelled while the other computed.
    for state in roles.learning.values():
        state.wait_params()


def _any_counts(experience: Experience, samples: Tensor, mesh: Mesh) -> bool:
    """Whether any token of a minibatch counts, on any replica; all ranks get the same."""
    ids = (experience.learned or experience.actions).ids
    counting = (ids[samples.to(ids.device)] != NO_ACTION).sum()
    return bool(sum_over_data(counting.float(), mesh) > 0)


def minibatches(num_samples: int, config: Config, mesh: Mesh, *, step: int) -> Iterator[Tensor]:
    """Yield this replica's sample indices of every minibatch of all epochs, in a drawn order.

    Which samples form a minibatch was settled when prompts were assigned to the ranks
    (`local_indices`), so it does not depend on the layout.

    Args:
        num_samples: of this replica.
        config: of the run.
        mesh: this rank's mesh.
        step: PPO step, from 0.
    """
    parts = torch.arange(num_samples).split(config.ppo.minibatch_size // mesh.dp_size)
    for epoch in range(config.ppo.epochs):
        keys = fold(config.run.seed, step, UPDATE_STREAM, epoch, torch.arange(len(parts)))
        for number in keys.argsort().tolist() if len(parts) > 1 else [0]:
            yield parts[number]


def policy_learner(
    policy: TrainState, config: Config, *, filtered: bool = False, replayed: bool = False
) -> Learner:
    """Return the policy with its objective; `filtered` and `replayed` as the samples are."""
    return Learner(
        role="policy",
        state=policy,
        forward=partial(
            logprob_forward,
            temperature=config.rollout.temperature,
            filtered=filtered,
            replayed=replayed,
        ),
        objective=partial(policy_objective, config=config),
    )


def critic_learner(critic: TrainState, config: Config) -> Learner:
    """Return the critic with its clipped squared error."""
    return Learner(
        role="critic",
        state=critic,
        forward=value_forward,
        objective=partial(critic_objective, config=config),
    )


def policy_objective(output: Tensor, microbatch: PpoMicrobatch, *, config: Config) -> LossOutput:
    """`ppo.objective` plus, where asked for, KL and entropy terms, all over the same count.

    Args:
        output: [2, batch, response], log-probs and entropies of the policy being trained; third,
            where the sampler filtered, the log-probs over the whole vocabulary.
        microbatch: the samples.
        config: of the run.
    """
    logprobs, advantages = output[0], microbatch.advantages
    actions = microbatch.learned or microbatch.actions
    compared = logprobs, microbatch.old_logprobs, advantages, actions
    ppo, ratio = config.ppo, config.macro.ratio
    match ppo.objective:
        case "clip":
            loss = policy_loss(
                *compared,
                ratio=ratio,
                aggregation=ppo.aggregation,
                clip_range=ppo.clip_range,
                clip_range_high=ppo.clip_range_high,
                dual_clip=ppo.dual_clip,
            )
        case "cispo":
            loss = cispo_loss(
                *compared,
                ratio=ratio,
                aggregation=ppo.aggregation,
                clip_range=ppo.clip_range,
                clip_range_high=ppo.clip_range_high,
            )
        case "pg":
            loss = pg_loss(logprobs, advantages, actions, aggregation=ppo.aggregation)
        case "p3o":
            loss = p3o_loss(*compared, kl_coef=ppo.kl_coef, clip_range=ppo.clip_range)
    return _with_penalties(loss, output, microbatch, config)


def _with_penalties(
    loss: LossOutput, output: Tensor, microbatch: PpoMicrobatch, config: Config
) -> LossOutput:
    logprobs, entropy, *full = output
    ppo, actions = config.ppo, microbatch.learned or microbatch.actions
    total, metrics = loss.loss_sum, dict(loss.metrics)
    if ppo.kl_loss_coef:
        assert microbatch.ref_logprobs is not None
        divergence = kl_loss(
            full[0] if full else logprobs,
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
    return _counted(LossOutput(loss_sum=total, count=loss.count, metrics=metrics), config)


def _counted(loss: LossOutput, config: Config) -> LossOutput:
    if config.ppo.aggregation == "seq_sum_const":
        return over_budget(loss, config.rollout.max_response_tokens)
    return loss


def critic_objective(output: Tensor, microbatch: PpoMicrobatch, *, config: Config) -> LossOutput:
    """Clipped squared error to the returns of the macro actions.

    Args:
        output: [batch, response] values of the critic being trained.
        microbatch: the samples.
        config: of the run.
    """
    macro, actions = config.macro, microbatch.actions
    assert microbatch.old_values is not None
    assert microbatch.returns is not None
    pooled = macro.value_target == "macro"
    loss = value_loss(
        output,
        microbatch.old_values,
        microbatch.returns,
        actions,
        target=macro.value_target,
        pool_weights=value_weights(actions, macro.value, dtype=output.dtype) if pooled else None,
        aggregation=config.ppo.aggregation,
        clip_range=config.ppo.value_clip_range,
    )
    return _counted(loss, config)


def make_microbatches(
    experience: Experience, samples: Tensor, config: Config, mesh: Mesh
) -> list[PpoMicrobatch]:
    """Cut a minibatch into microbatches that suit the layout.

    Args:
        experience: this replica's samples.
        samples: [minibatch] int64, which of them.
        config: of the run.
        mesh: this rank's mesh.
    """
    chosen = samples.tolist()
    batches = make_batches(
        [experience.prompts[i] for i in chosen],
        [experience.responses[i] for i in chosen],
        limit=MicrobatchLimit.of(config.ppo),
        mesh=mesh,
        kept=None if experience.kept is None else experience.kept[samples],
        routing=None if experience.routing is None else experience.routing[samples],
        group=2 if config.ppo.objective == "p3o" else 1,
    )
    return [_take(experience, samples, part) for part in batches.microbatches]


def _take(experience: Experience, samples: Tensor, part: IndexedBatch) -> PpoMicrobatch:
    """Return a microbatch; a filler sequence has no macro action."""
    batch, real = part.batch, part.indices < len(samples)
    chosen = samples[part.indices.where(real, 0)]

    def cut(values: Tensor) -> Tensor:
        return values[chosen.to(values.device), : batch.num_columns]

    def cut_known(values: Tensor | None) -> Tensor | None:
        return None if values is None else cut(values)

    def cut_actions(whole: MacroActions) -> MacroActions:
        ids = cut(whole.ids)
        return MacroActions.from_ids(ids.where(real.to(ids.device)[:, None], NO_ACTION))

    learned = experience.learned
    return PpoMicrobatch(
        batch=batch,
        actions=cut_actions(experience.actions),
        learned=None if learned is None else cut_actions(learned),
        old_logprobs=cut(experience.old_logprobs),
        ref_logprobs=cut_known(experience.ref_logprobs),
        old_values=cut_known(experience.old_values),
        advantages=cut(experience.advantages),
        returns=cut_known(experience.returns),
    )


def _by_name(microbatches: Sequence[PpoMicrobatch]) -> dict[str, Tensor]:
    """Return all tensors of a minibatch, named by the number of their microbatch."""
    found: dict[str, Tensor] = {}
    for number, microbatch in enumerate(microbatches):
        batch = microbatch.batch
        tensors = {
            "tokens": batch.tokens,
            "prompt_lengths": batch.prompt_lengths,
            "response_lengths": batch.response_lengths,
            "macro_action_ids": microbatch.actions.ids,
            **{name: getattr(microbatch, name) for name in PER_TOKEN},
        }
        found |= {f"{number}.{name}": t for name, t in tensors.items() if t is not None}
    return found
