"""Optimizers, and the jobs that train on given answers: sft, reward."""

import math
from typing import Literal

from pydantic import Field

from marlhf_mega.config.section import Section

Turns = Literal["last", "all"]


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(1e-5, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate that a decaying schedule reaches one step after the last."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up, over all optimizer steps of the run."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up from 0 to `lr`."""
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """The same as a share of the run's optimizer steps, rounded up; instead of `warmup_steps`."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay. Norms and biases have none."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of Adam's second moment. 0.95 is customary for language models."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm. 0 means no clipping."""

    def num_warmup_steps(self, total_steps: int) -> int:
        """Return the optimizer steps of warm-up in a run of `total_steps`."""
        return math.ceil(self.warmup_ratio * total_steps) or self.warmup_steps


class SftConfig(Section):
    """Supervised fine-tuning. The optimizer is that of `policy`."""

    batch_size: int = Field(64, gt=0)
    """Sequences per optimizer step, over all ranks."""
    microbatch_size: int = Field(8, gt=0)
    """Sequences per forward pass on one data-parallel rank."""
    packing: bool | None = None
    """Concatenate the sequences of a microbatch instead of padding them. None means on GPUs only:
    there every padded shape would need an attention kernel of its own."""
    turns: Turns = "last"
    """Which assistant turns of a row of `messages` are learned: the last one, or all. A response is
    then all that follows the first prompt."""


class RewardModelConfig(OptimizerConfig):
    """Training of a reward model on preference pairs, with its optimizer."""

    batch_size: int = Field(64, gt=0)
    """Pairs per optimizer step, over all ranks."""
    microbatch_size: int = Field(8, gt=0)
    """Pairs per forward pass on one data-parallel rank."""
    packing: bool | None = None
    """Concatenate the sequences of a microbatch instead of padding them. None means on GPUs only:
    there every padded shape would need an attention kernel of its own."""
    loss: Literal["last", "span"] = "last"
    """Bradley-Terry loss on the score of the last token, or on the scores of all tokens from the
    first difference on."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a label is wrong."""
    length_coef: float = Field(0.0, ge=0)
    """ODIN: weight of the correlations that keep the length out of the score. Above 0 a second head
    learns the length beside it and is dropped from exports and rewards; in training accuracy,
    margin and score are of the sum of both. Takes one more forward pass over each batch, which is
    to be large enough for a correlation."""
    overlap_coef: float = Field(1.0, ge=0)
    """ODIN: weight of the |cosine| between the two heads."""
    label_update: float = Field(0.0, ge=0, lt=1)
    """Iterative data smoothing: after every epoch each label moves by this share towards what the
    model says of its pair. Takes a pass over all training pairs. 0 means that labels stay."""
    center_coef: float = Field(0.0, ge=0)
    """Weight of (chosen + rejected)^2, which keeps scores near zero."""
    latent_size: int = Field(0, ge=0)
    """VPL: size of a latent for the user of a pair (field `user`), which a network infers from
    other pairs of that user and the score depends on; 512 in the released code. Takes the states
    of these pairs in every step. Such a model judges held-out pairs of its own run; ppo and others
    cannot score with it. 0 means one score for all users."""
    latent_context: int = Field(8, gt=0)
    """VPL: most other pairs of the user that a pair is judged by."""
    latent_kl_coef: float = Field(0.01, ge=0)
    """VPL: weight of the KL divergence of the latent from N(0, 1), in nats per pair."""
    latent_kl_cycle: int = Field(10000, ge=0)
    """VPL: steps in which that weight rises from a tenth, by half a cosine, again and again. 0
    means that it is constant."""


class CriticConfig(OptimizerConfig):
    """Optimizer and initial weights of the critic."""

    init: str = "reward"
    """`reward` (the first reward model of `reward.source`, else the policy), `policy` (its body
    with a new head), or a run directory."""
    share_base: bool = False
    """ppo: with `model.lora.rank`, the critic is adapters and a head on the policy's frozen
    weights; from `critic.init` it takes these, and not a model that they are merged into."""
