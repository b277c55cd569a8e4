"""Methods that learn from given responses: preference, offline."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from marlhf_mega.algorithm.choices import (
    OfflineAlgorithm,
    OfflineCompat,
    PairMargin,
    PreferenceLoss,
    PrioritySampling,
)
from marlhf_mega.config.section import Section


class PreferenceConfig(Section):
    """Learning from pairs, given ones or the policy's own. The optimizer is that of `policy`."""

    loss: PreferenceLoss = "dpo"
    """What is minimised over pairs: see the table of methods in marlhf_mega/algorithm/README.md."""
    beta: float = Field(0.1, gt=0)
    """How strongly the reference holds the policy: beta of `dpo`, `xpo` and `bfpo`, tau of `ipo`
    and `ipo_md`, weight of the divergence of `nash_md`; alpha of `cpl`, which has no reference."""
    num_responses: int = Field(2, ge=2)
    """`pro`: responses to a prompt. Its rows have lists `responses` and `rewards` of so many."""
    cpl_bias: float = Field(0.5, gt=0, le=1)
    """`cpl`: lambda, the weight of the rejected response."""
    gamma: float = Field(1.0, gt=0, le=1)
    """`cpl`: discount per macro action of `macro.rule`. With 1 there are no actions."""
    xpo_alpha: float = Field(1e-5, ge=0)
    """`xpo`: weight of the log-likelihood of the response that the reference gave: the field
    `from_reference` of a row says `chosen` or `rejected`."""
    bfpo_factor: float = Field(3.0, gt=1)
    """`bfpo`: how much more the safety of the chosen response counts than that of the other. Rows
    have `chosen_safe` and `rejected_safe`, true or false."""
    bfpo_shift: float = 0.5
    """`bfpo`: what is subtracted from the label."""
    refuel_eta: float = Field(1.0, gt=0)
    """`refuel`: nats of difference that a difference of 1 between two rewards asks for."""
    mixture: float = Field(0.125, ge=0, lt=1)
    """`nash_md`, `ipo_md`: the reference's share in the logits that the opponent of `nash_md`, and
    both responses of `ipo_md`, are drawn from. 0 means that all are the policy's own: `ipo_md` is
    then online IPO. 0.125 as in EGPO's code; TRL's Nash-MD has 0.5."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """`dpo`: probability that a label is wrong (conservative DPO), besides what the
    `chosen_probability` of a row says."""
    nll_coef: float = Field(0.0, ge=0)
    """Weight of the chosen response's negative log-likelihood per token, which keeps it likely. Of
    `pro` it is the sum over the best response, times the squared number of the others; 0.05 in its
    paper."""
    length_normalize: bool = False
    """Compare means over the tokens of a response instead of sums."""
    margin: PairMargin = "none"
    """What the `margin` of a row does: nothing; `dpo`: by how much the implicit rewards are to
    differ (`offset`); or it weights the loss of its pair. `refuel` takes it as the difference of
    the rewards."""
    reference: str = "policy"
    """The model whose log-probs are the reference: the first weights of the policy, or those of a
    run directory or a Hugging Face folder."""
    reference_dir: Path | None = None
    """Where the reference's log-probs are kept, under a hash of model and data, so that several
    runs compute them once. None means `run.dir`/reference."""
    batch_size: int = Field(64, gt=0)
    """Pairs per optimizer step, over all ranks."""
    microbatch_size: int = Field(8, gt=0)
    """Pairs per forward pass on one data-parallel rank."""
    packing: bool | None = None
    """Concatenate the sequences of a microbatch instead of padding them. None means on GPUs only:
    there every padded shape would need an attention kernel of its own."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.loss not in ("cpl", "pro")

    @property
    def is_online(self) -> bool:
        """Whether the policy answers prompts in every step, and `reward` judges its pairs."""
        return self.loss in ("nash_md", "ipo_md")

    @property
    def has_actions(self) -> bool:
        """Whether responses are cut into macro actions."""
        return self.loss == "cpl" and self.gamma != 1


class OfflineConfig(Section):
    """Advantage Leftover Lunch RL (A-LoL, arXiv 2305.14718). The optimizer is that of `policy`."""

    algorithm: OfflineAlgorithm = "a_lol"
    """What weights the likelihood of a response: nothing, its reward, or its advantage, with or
    without likelihood ratios: of the response, of each token (`a_lol_seq`), or of each macro action
    (`a_lol_macro`, which reads the boundaries of `macro`)."""
    sampling: Literal[PrioritySampling, "all"] = "good_priority"
    """Draw responses in proportion to their positive advantage, uniformly among those with one, or
    all in turn. `all_priority` is the first over both responses of pairs, `chosen` and `rejected`
    with `chosen_reward` and `rejected_reward`."""
    compat: OfflineCompat = "none"
    """`lol_rl` is a preset, the released code: `a_lol_ref_free` also counts negative advantages,
    and with `all_priority` a rejected response is drawn by its own reward and learned with that of
    the chosen one."""
    clip_range: float | None = Field(0.9, gt=0)
    """Likelihood ratios are clipped to 1 +- this. None means no clipping."""
    kl_coef: float = Field(0.0, ge=0)
    """`a_lol_kl`: weight of the KL divergence from the initial policy."""
    batch_size: int = Field(64, gt=0)
    """Responses per optimizer step, over all ranks."""
    microbatch_size: int = Field(8, gt=0)
    """Responses per forward pass on one data-parallel rank."""
    packing: bool | None = None
    """Concatenate the sequences of a microbatch instead of padding them. None means on GPUs only:
    there every padded shape would need an attention kernel of its own."""
    value_epochs: int = Field(10, gt=0)
    """Passes over the validation prompts that teach a head on the frozen model of `critic.init`,
    with the optimizer of `critic`, what a prompt is worth. The one with the least error is kept."""

    @property
    def needs_values(self) -> bool:
        """Whether the job uses advantages."""
        return self.algorithm.startswith("a_lol") or self.sampling != "all"

    @property
    def needs_reference(self) -> bool:
        """Whether the job uses log-probs of the initial policy."""
        return self.algorithm in ("r_lol", "a_lol", "a_lol_seq", "a_lol_macro", "a_lol_kl")
