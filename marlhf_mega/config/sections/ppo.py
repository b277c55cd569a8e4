"""The PPO engine."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from marlhf_mega.algorithm.choices import (
    Aggregation,
    Estimator,
    LossKl,
    MismatchUnit,
    Objective,
    RewardKl,
)
from marlhf_mega.config.section import Section

UNWHITENED: tuple[Estimator, ...] = ("rloo", "grpo", "dr_grpo", "remax", "brain")


class PPOConfig(Section):
    """The PPO update."""

    estimator: Estimator = "gae"
    """How advantages are estimated: over the values of a critic (`gae`, and `sae`, whose traces
    decay only where actions end), or without a critic. See algorithm/README.md."""
    vine_samples: int = Field(9, gt=0)
    """`vine`: responses that continue from the start of every macro action; their mean score is its
    value. 9 as in VinePPO."""
    objective: Objective = "clip"
    """Loss of the policy: the clipped surrogate, CISPO (which clips weights and no gradient), the
    plain policy gradient, or P3O on pairs of responses."""
    epochs: int = Field(1, gt=0)
    """Passes over the batch of a rollout."""
    critic_only_steps: int = Field(0, ge=0)
    """Number of first PPO steps that update only the critic."""
    minibatch_size: int = Field(64, gt=0)
    """Sequences per optimizer step, over all ranks. Must divide `rollout.batch_size`,
    or what `rollout.filter` leaves of it."""
    microbatch_size: int = Field(8, gt=0)
    """Sequences per forward pass on one data-parallel rank."""
    microbatch_tokens: int | None = Field(None, gt=0)
    """Tokens per forward pass, padding included, instead of `microbatch_size`: more short sequences
    go together, and minibatches are balanced by tokens over the data-parallel ranks. None means
    `microbatch_size` sequences."""
    scoring_microbatch_factor: int = Field(1, gt=0)
    """Enlarges microbatches by this factor in passes without a backward pass: log-probs, values and
    scores of the experience, and evaluation."""
    packing: bool | None = None
    """Concatenate the sequences of a microbatch instead of padding them. None means on GPUs only:
    there every padded shape would need an attention kernel of its own."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    gae_lambda_critic: float | None = Field(None, ge=0, le=1)
    """Lambda of the returns that the critic learns. None means that of the policy."""
    gae_lambda_alpha: float | None = Field(None, gt=0)
    """Instead of `gae_lambda`: lambda 1 - 1 / (this x length) for each response, its length counted
    as lambda is. VAPO has 0.05. None means `gae_lambda`."""
    clip_range: float = Field(0.2, gt=0)
    """The ratio is clipped to 1 +- this."""
    clip_range_high: float | None = Field(None, gt=0)
    """The ratio's upper limit is 1 + this (clip-higher; DAPO has 0.28). None means `clip_range`."""
    dual_clip: float | None = Field(None, gt=1)
    """Bounds the loss of tokens with a negative advantage by this times the advantage (dual-clip
    PPO). None means no bound."""
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    """Where the log-probs at rollout come from: recomputed as in training, or the sampler's own.
    The latter saves a scoring pass, and entropy and the gap between the two are not reported."""
    router_replay: bool = True
    """With experts: where the policy is scored and updated, tokens go to the experts that they went
    to in the rollout (R3, arXiv 2510.11370), not where the trainer's rounding would send them. With
    `rollout.engine=vllm` it must be false."""
    tis_cap: float | None = Field(None, ge=1)
    """Truncated importance sampling: scale each term by the probability ratio of trainer and
    sampler, at most this. 2 is common. None means no correction."""
    sampler_mask: MismatchUnit | None = None
    """Leave out tokens, macro actions or sequences whose probability ratio of trainer and sampler,
    per token, is outside of `sampler_bounds`. None means none."""
    sampler_bounds: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=1)]] = (
        0.5,
        5.0,
    )
    """`sampler_mask`: lowest and highest ratio that is kept. Those of IcePop."""
    likely_mask: float | None = Field(None, gt=0, lt=1)
    """Leave tokens that the policy found likelier than this at rollout out of its loss and out of
    whitening; if all are, none. SPO has 0.9. None means that all tokens count."""
    value_clip_range: float | None = Field(0.2, gt=0)
    """New values are clipped to old values +- this. None means no clipping."""
    kl_coef: float = Field(0.05, ge=0)
    """Weight of the KL penalty in the reward. 0.05 as in MA-RLHF. With 0 here and in `kl_loss_coef`
    there is no reference model, and no divergence from it among the metrics, unless
    `macro.rule=perplexity` asks it."""
    kl_estimator: RewardKl = "k1"
    """Estimator of the KL penalty in the reward."""
    kl_target: float | None = Field(None, gt=0)
    """KL per response, in nats, that an adaptive coefficient steers to. None means a constant
    coefficient."""
    kl_horizon: int = Field(10000, gt=0)
    """Responses over which the adaptive coefficient reacts."""
    kl_loss_coef: float = Field(0.0, ge=0)
    """Weight of a KL penalty in the loss."""
    kl_loss_estimator: LossKl = "k2"
    """Estimator of the KL penalty in the loss. Both have the same gradient."""
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus in the loss."""
    whiten_advantages: bool = True
    """Normalise advantages to mean 0 and variance 1 over the batch of a rollout. Without being set
    it is false for `rloo`, `grpo`, `dr_grpo`, `remax` and `brain`, whose papers do not."""
    aggregation: Aggregation = "token_mean"
    """What the policy loss is a mean over, within a minibatch: tokens, sequences (of means or sums,
    or of sums over `rollout.max_response_tokens`, `seq_sum_const`) or macro actions."""

    @model_validator(mode="before")
    @classmethod
    def _whitening(cls, values: Any) -> Any:
        """Set `whiten_advantages` as the estimator's paper has it, unless the user has."""
        if isinstance(values, dict) and values.get("estimator") in UNWHITENED:
            return {"whiten_advantages": False} | values
        return values

    @property
    def has_critic(self) -> bool:
        """Whether the estimator needs values."""
        return self.estimator in ("gae", "sae")

    @property
    def compares_groups(self) -> bool:
        """Whether the estimator compares the responses to a prompt."""
        return self.estimator in ("rloo", "grpo", "dr_grpo", "reinforce_pp_baseline", "brain")
