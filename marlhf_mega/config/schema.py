"""Every key of a run's configuration, with its unit, its range and its default."""

import glob
import math
import string
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from marlhf_mega.algorithm.choices import (
    Aggregation,
    Combination,
    Compat,
    DenseReward,
    EosRule,
    Estimator,
    LossKl,
    MacroReward,
    MacroRule,
    MismatchUnit,
    MissingEos,
    Objective,
    OfflineAlgorithm,
    OfflineCompat,
    PairMargin,
    PerplexityForm,
    PreferenceLoss,
    PrioritySampling,
    RandomMode,
    Ratio,
    RewardKl,
    SampleFilter,
    ScoreNormalization,
    Shaping,
    StepUnit,
    ValueRule,
    ValueTarget,
)
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.section import Section, spell_off

LongPrompts = Literal["error", "drop", "truncate"]
ControlTokens = Literal["text", "parse"]
Turns = Literal["last", "all"]


class RunConfig(Section):
    """Identity, length and limits of a run."""

    name: str = "run"
    """Title in logs and in the report."""
    dir: Path = Path("runs/run")
    """Run directory: configuration, metrics, samples, checkpoints, exported models and report."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Seed of every random draw, each a function of (seed, step, global sample index)."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps, or PPO steps of ppo. None means those of `epochs`."""
    epochs: int | None = Field(None, gt=0)
    """Passes over the training data, instead of `steps`. None means one."""
    max_skipped_steps: int = Field(3, ge=0)
    """Consecutive optimizer steps that may be skipped because the gradient is not finite. One more
    stops the run."""
    max_hours: float | None = Field(None, gt=0)
    """Hours since the launch, restarts included, after which the run saves a checkpoint at the end
    of a step and exits with code 75. None means no limit."""
    max_attempts: int = Field(5, gt=0)
    """Starts by a launcher from the same step. After as many without a new checkpoint the run exits
    with code 76, no progress."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"run.epochs={self.epochs}: cannot be combined with run.steps={self.steps}, which "
                "gives the length too. Remove one of the two, or set it to null."
            )
        return self


class ParallelConfig(Section):
    """Degrees of parallelism. Data-parallel size = world / (TP x PP x CP)."""

    tensor_size: int = Field(1, gt=0)
    """Tensor parallelism (TP): ranks that share every weight matrix."""
    pipeline_size: int = Field(1, gt=0)
    """Pipeline parallelism (PP): stages that the layers are split into."""
    virtual_pipeline_size: int = Field(1, gt=0)
    """Chunks of layers per stage (interleaved schedule). 1 means the plain 1F1B schedule."""
    context_size: int = Field(1, gt=0)
    """Context parallelism (CP): ranks that share every sequence, for long sequences. During
    generation each of them is a replica of its own."""
    expert_size: int = Field(1, gt=0)
    """Expert parallelism (EP): ranks that the experts of a layer are distributed over."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    overlap: bool = False
    """Overlap gradient reduction and parameter gathering with computation. Of use with data
    parallelism."""

    @property
    def model_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor_size * self.pipeline_size * self.context_size

    @property
    def generating(self) -> "ParallelConfig":
        """Degrees of the same ranks during generation, with the weights where they are.

        Without context parallelism: a sequence that grows token by token is not shared.
        """
        return self.model_copy(update={"context_size": 1})


class PrecisionConfig(Section):
    """Number formats. Master weights and optimizer state are always float32."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of weights and activations. `auto` means bfloat16 on GPUs and float32 on CPUs."""
    attention_backend: Literal["auto", "fused", "flash", "unfused"] = "auto"
    """Which attention kernel of Transformer Engine computes; they round differently. `auto` lets it
    choose. Use this key, not the NVTE_*_ATTN variables."""
    fp8: Annotated[Literal["off", "hybrid", "e4m3"], BeforeValidator(spell_off)] = "off"
    """Matrix products in FP8, by Transformer Engine. `hybrid` uses e5m2 for gradients and e4m3 for
    all else."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 scaling factors are computed. The default keeps no state between steps."""
    fp8_param_gather: bool = False
    """Keep and gather the weights of trained models in FP8. Only their master weights are exact."""
    fp8_edge_layers_bf16: int = Field(0, ge=0)
    """Number of first and of last layers that stay in bfloat16. Not available with `delayed`."""
    fp8_frozen: bool = False
    """Run the reference and the reward models in FP8 as well. Otherwise they run in `dtype`."""
    fp8_check_interval: int = Field(0, ge=0)
    """ppo: compare a microbatch with and without FP8 every so many steps. 0 means never."""
    fp8_max_logprob_gap: float = Field(0.1, gt=0)
    """Largest mean log-prob difference that such a check accepts, in nats per token."""
    fp8_min_cosine: float = Field(0.9, ge=-1, le=1)
    """Smallest cosine between the two gradients that such a check accepts."""
    fp8_on_divergence: Literal["warn", "leave"] = "warn"
    """What a failed check does: log a warning, or also leave FP8 for the rest of the run."""

    @property
    def fp8_alignment(self) -> int:
        """What rows and columns of FP8 matrix products must be a multiple of; 1 without FP8."""
        if self.fp8 == "off":
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    def frozen(self) -> Self:
        """Return the formats of a model that is not trained."""
        fp8 = self.fp8 if self.fp8_frozen else "off"
        return self.model_copy(update={"fp8": fp8, "fp8_param_gather": False})


class MemoryConfig(Section):
    """Trades time for device memory. Results do not depend on it."""

    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass of trained models recomputes: nothing, the core of attention (pays off
    with softcaps, as fused kernels keep little), or whole layers."""
    recompute_num_layers: int | None = Field(None, gt=0)
    """`full`: layers to recompute in each chunk of a stage. None means all."""
    offload_idle: bool = False
    """ppo: move the reference, the reward models and the critic to host memory during phases that
    do not use them."""
    offload_optimizer: bool = False
    """ppo: keep master weights, Adam moments and gradients in host memory outside of updates."""


class TokenizerConfig(Section):
    """Conversion of text to token ids."""

    path: Path | None = None
    """A SentencePiece .model file or a Hugging Face tokenizer folder. None means
    `model.hf_path`."""


class DataSource(Section):
    """Where examples come from, and how often an epoch visits them."""

    path: str = Field(min_length=1)
    """A file (.jsonl, .jsonl.gz, .parquet), a pattern of files (`shards/*.jsonl`), or a data set of
    the Hugging Face Hub or of a folder: `hf://NAME:SPLIT`, `hf://NAME/SUBSET:SPLIT`."""
    weight: float = Field(1.0, gt=0)
    """Visits of each example in one epoch. 0.3 takes the next 30 % of a shuffled order in every
    epoch; 2 takes all of them twice."""

    @property
    def is_hub(self) -> bool:
        """Whether the library `datasets` reads it."""
        return self.path.startswith("hf://")

    def files(self) -> list[str]:
        """Return what the path names, a pattern's files in the order of their names."""
        if self.is_hub or Path(self.path).is_file():
            return [self.path]
        # Path.glob takes no absolute pattern.
        return sorted(glob.glob(self.path, recursive=True)) or [self.path]  # noqa: PTH207


def _sources(value: object) -> object:
    """Read a path, or a list of paths and of `{path, weight}`."""
    if isinstance(value, str | Path):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    if not value:
        return None
    return [{"path": str(item)} if isinstance(item, str | Path) else item for item in value]


Sources = Annotated[tuple[DataSource, ...] | None, BeforeValidator(_sources)]


def show_sources(sources: tuple[DataSource, ...] | None) -> str:
    """Return the paths for a message: one alone, several as a list."""
    paths = [source.path for source in sources or ()]
    return paths[0] if len(paths) == 1 else f"[{','.join(paths)}]"


FieldName = Literal[
    "prompt",
    "response",
    "messages",
    "chosen",
    "rejected",
    "margin",
    "chosen_probability",
    "reward",
    "chosen_reward",
    "rejected_reward",
    "finished",
    "chosen_safe",
    "rejected_safe",
    "from_reference",
    "responses",
    "rewards",
]


class DataConfig(Section):
    """Training and validation data."""

    train_path: Sources = None
    """Training examples, with the fields that the job needs: a path, or a list of paths and of
    `{path, weight}`. An epoch of several visits each example as often as its weight says, in one
    shuffled order."""
    validation_path: Sources = None
    """Held-out examples with the same fields, all of them once."""
    fields: dict[FieldName, str] = Field({})
    """Fields of the rows under other names: `{prompt: question, response: answer}`. A pair may have
    a `margin`, which the lead of the chosen response is to exceed (the difference of two ratings;
    also negative), and `chosen_probability`, a soft label from 0 to 1."""
    max_prompt_tokens: int = Field(512, gt=0)
    """Longest prompt, in tokens."""
    max_response_tokens: int = Field(512, gt=0)
    """Longest response of the examples of sft, reward, preference and offline, in tokens. Longer
    ones are truncated and counted."""
    long_prompts: LongPrompts = "error"
    """What happens to longer prompts: the run does not start, they are dropped, or they lose their
    beginning. The last two are counted."""
    control_tokens: ControlTokens = "text"
    """What a control token (`<|im_end|>`) that is spelled out in a chat message or inside a
    response becomes: ordinary text, or the token itself (`parse`). Text prompts, which may come
    from a template, and an end token at the very end of a response are always parsed."""
    shuffle: bool = True
    """Draw the examples in a new order every epoch. Otherwise in file order."""


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
    packing: bool = False
    """Concatenate the sequences of a microbatch instead of padding them."""
    turns: Turns = "last"
    """Which assistant turns of a row of `messages` are learned: the last one, or all. A response is
    then all that follows the first prompt."""


class RewardModelConfig(OptimizerConfig):
    """Training of a reward model on preference pairs, with its optimizer."""

    batch_size: int = Field(64, gt=0)
    """Pairs per optimizer step, over all ranks."""
    microbatch_size: int = Field(8, gt=0)
    """Pairs per forward pass on one data-parallel rank."""
    packing: bool = False
    """Concatenate the sequences of a microbatch instead of padding them."""
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


class CriticConfig(OptimizerConfig):
    """Optimizer and initial weights of the critic."""

    init: str = "reward"
    """`reward` (the first reward model of `reward.source`, else the policy), `policy` (its body
    with a new head), or a run directory."""


def _one(value: object) -> object:
    return (value,) if isinstance(value, int | str) else value


class RolloutConfig(Section):
    """Generation."""

    batch_size: int = Field(64, gt=0)
    """Sequences per PPO step, over all ranks."""
    max_response_tokens: int = Field(64, gt=0)
    """Longest response in tokens, the end token included."""
    temperature: float = Field(1.0, ge=0)
    """Divisor of the logits, in sampling and wherever log-probs are recomputed. 0 means greedy,
    which ppo does not allow."""
    top_k: int = Field(0, ge=0)
    """Sample among the k most likely tokens. 0 means all. ppo renormalises the policy's log-probs
    over the tokens that `top_k` and `top_p` kept, which takes 4 k bytes of host memory a token."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the smallest set of tokens with this total probability. Without `top_k` ppo
    keeps one bit per token of the vocabulary for each response token, in host memory."""
    stop: Annotated[
        tuple[int | Annotated[str, Field(min_length=1)], ...], BeforeValidator(_one)
    ] = ()
    """What ends a response besides the end tokens of tokenizer and model: token ids, or texts. A
    text ends it with the token that completes it; the text of a control token is that token."""
    keep_special_tokens: bool = False
    """Whether code and HTTP rewards and the files of generate see the special tokens of a response
    (a tool call's). The end token is never part of its text."""
    samples_per_prompt: int = Field(1, gt=0)
    """ppo and generate: responses to each prompt, which ppo's critic judges one by one; other
    answers are single. Must divide `batch_size`."""
    filter: SampleFilter | None = None
    """ppo: which samples are trained on, by their raw scores: as many, drawn with replacement by
    |score|^`filter_power` (`pf_ppo`); of each prompt the best and the worst, the best and another,
    or only the best; or all, after new prompts have replaced those whose responses score alike
    (`dynamic`). None means all."""
    filter_power: float = Field(2.0, gt=0)
    """`pf_ppo`: power of the score's size. 2 as in verl."""
    filter_tries: int = Field(10, gt=0)
    """`dynamic`: how often a step generates, the first time included. After that prompts whose
    responses score alike are taken as they are. 10 as in DAPO."""
    slots: int | None = Field(None, gt=0)
    """Sequences that one data-parallel rank decodes together. None means its whole share."""
    ranks: int = Field(0, ge=0)
    """ppo: number of ranks, the last ones, that only generate. 0 means that all ranks train and
    generate."""
    staleness: Literal[0, 1] = 0
    """1: `ranks` generate the next batch, with weights one step old, while the others train on this
    one. 0: they wait for the newest weights."""
    cuda_graphs: bool = False
    """Launch each decode step as one CUDA graph. Not available with experts or FP8."""
    tensor_size: int | None = Field(None, gt=0)
    """Tensor-parallel size of generation. None means that of training."""
    pipeline_size: int | None = Field(None, gt=0)
    """Pipeline stages of generation. None means those of training. A layout of its own costs a copy
    of the weights, in memory and in time, in each rollout; fewer stages make more replicas."""

    @property
    def is_filtered(self) -> bool:
        """Whether tokens are drawn from some of the vocabulary only."""
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def trained_per_prompt(self) -> int:
        """Responses to a prompt that are trained on."""
        match self.filter:
            case "best_of_n":
                return 1
            case "best_worst" | "best_random":
                return 2
        return self.samples_per_prompt

    @property
    def trained_size(self) -> int:
        """Sequences of a PPO step that are trained on, over all ranks."""
        return self.batch_size // self.samples_per_prompt * self.trained_per_prompt


class MacroConfig(Section):
    """Macro actions: which tokens form one, and how their rewards and values are pooled."""

    rule: MacroRule = "fixed_ngram"
    """Where an action ends. `token` is ordinary PPO, `whole_response` is a bandit."""
    n: int = Field(5, gt=0)
    """`fixed_ngram`: tokens per action. 5 is the default of MA-RLHF."""
    lengths: tuple[Annotated[int, Field(gt=0)], ...] = Field((2, 3, 5, 10), min_length=1)
    """`random_ngram`: lengths of the shuffled list, in tokens."""
    repeats: int = Field(3, gt=0)
    """`random_ngram`: how often the list contains each length."""
    random_mode: RandomMode = "cycle"
    """`random_ngram`: what follows the list: one last action (`list`), or another shuffled list
    (`cycle`)."""
    perplexity: PerplexityForm = "segment"
    """`perplexity`: start an action where the perplexity of the token, of the prefix or of the
    current action rises."""
    probability: float = Field(0.2, gt=0, le=1)
    """`probability`: a token that the policy found less likely starts an action. 0.2 as in SAE."""
    entropy_share: float = Field(0.3, gt=0, le=1)
    """`entropy`: share of a response's tokens, those of highest entropy, that end an action. 0.3 as
    in Segment-Aligned PO."""
    parser: str = "rules"
    """`parsing`: `rules` (English phrases), `python` (syntax tree), or
    `module:factory` or `path/to/file.py:factory`."""
    cutoff: int = Field(5, gt=0)
    """`parsing`: a constituent with fewer tokens is one action."""
    min_length: int = Field(1, gt=0)
    """Tokens. Shorter actions are merged into the previous one."""
    max_length: int | None = Field(None, gt=0)
    """Tokens. Longer actions are split. None means no limit."""
    eos: EosRule = "join"
    """Whether the end token joins the last action or is an action of its own."""
    value: ValueRule = "equal"
    """Weights that pool token values into the value of an action: the mean (`equal`), the last
    token (`unit`), heavier towards the end (`position`, as in the paper) or the start
    (`position_repo`, as in its code), or the first token."""
    reward: MacroReward = "sum"
    """How token rewards are pooled. `mean` takes the weights of `value`, so that the KL penalty
    does not grow with the length."""
    ratio: Ratio = "token"
    """Likelihood ratio of the policy loss: per token, of the whole action, or its geometric mean
    per token."""
    discount: StepUnit = "per_macro"
    """Whether gamma applies per action or per token."""
    lambda_unit: StepUnit = "per_macro"
    """Whether lambda applies per action or per token."""
    value_target: ValueTarget = "token"
    """What regresses to the return of an action: the value of each of its tokens, or its pooled
    value."""
    compat: Compat = "none"
    """`ma_rlhf` is a preset, the released code: its boundaries with their empty actions,
    `macro.reward=mean` and `ppo.whiten_advantages=false`."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> "MacroConfig":
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(
                f"macro.max_length={self.max_length}: must be at least macro.min_length="
                f"{self.min_length}. Raise it, or lower macro.min_length."
            )
        return self


UNWHITENED: tuple[Estimator, ...] = ("rloo", "grpo", "dr_grpo", "remax")


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
    packing: bool = False
    """Concatenate the sequences of a microbatch instead of padding them."""
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
    it is false for `rloo`, `grpo`, `dr_grpo` and `remax`, whose papers do not."""
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
        return self.estimator in ("rloo", "grpo", "dr_grpo", "reinforce_pp_baseline")


class PreferenceConfig(Section):
    """Learning from preference pairs without a reward model. The optimizer is that of `policy`."""

    loss: PreferenceLoss = "dpo"
    """What is minimised over pairs: see the table of methods in marlhf_mega/algorithm/README.md."""
    beta: float = Field(0.1, gt=0)
    """How strongly the reference holds the policy: beta of `dpo`, `xpo` and `bfpo`, tau of `ipo`;
    alpha of `cpl`, which has no reference."""
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
    packing: bool = False
    """Concatenate the sequences of a microbatch instead of padding them."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.loss not in ("cpl", "pro")

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
    packing: bool = False
    """Concatenate the sequences of a microbatch instead of padding them."""
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


def _quoted(value: object) -> object:
    if isinstance(value, list | tuple) and any(isinstance(item, bool) for item in value):
        raise ValueError(
            "reward.source.answers: must be texts; YAML reads Yes and No as true and false. Quote "
            "them."
        )
    return value


class RewardSource(Section):
    """What gives a response a score."""

    key: ClassVar[str] = "reward.source"
    source: str
    """A reward model (run directory or Hugging Face folder), a code reward `module:function` or
    `path/to/file.py:function`, or an HTTP reward `http://...` (bearer token in
    MARLHF_REWARD_TOKEN)."""
    timeout_seconds: float = Field(10.0, gt=0)
    """Time limit of a code reward for one response, of an HTTP reward for one request. Responses
    that exceed it have no score and do not count. `compiler_signal` takes it as the CPU time of
    one test, at most 4 s."""
    sandbox: Annotated[Literal["namespaces", "off"], BeforeValidator(spell_off)] = "namespaces"
    """How a code reward runs generated programs. `off` runs them with all rights of this user."""

    template: str | None = None
    """What a reward model reads, such as `{response} {prompt} {principle} The quality is`: fields
    of the data row in braces, with `{prompt}` and `{response}`. None means prompt and response."""
    answers: Annotated[tuple[str, str] | None, BeforeValidator(_quoted)] = None
    """Two texts to follow the template, such as [" Yes", " No"]: the score is log p of the first
    less log p of the second, and `source` a language model."""

    @property
    def is_language(self) -> bool:
        """Whether it is a language model, which gives log-probs."""
        return self.answers is not None

    @property
    def template_fields(self) -> tuple[str, ...]:
        """Names in the template, in its order."""
        parts = string.Formatter().parse(self.template or "")
        return tuple(name for _, name, _, _ in parts if name is not None)

    @property
    def is_rule(self) -> bool:
        """Whether `source` names a function: by its module, or by its file."""
        place, _, function = self.source.rpartition(":")
        is_module = all(part.isidentifier() for part in place.split("."))
        named = is_module or (place.endswith(".py") and not self.is_server)
        return named and function.isidentifier()

    @property
    def is_server(self) -> bool:
        """Whether `source` is a web address."""
        return self.source.startswith(("http://", "https://"))

    @property
    def is_model(self) -> bool:
        """Whether `source` is a reward model, which runs on the ranks."""
        return not self.is_rule and not self.is_server

    @model_validator(mode="after")
    def _template_is_usable(self) -> Self:
        if self.template is None:
            if self.answers is not None:
                raise ValueError(
                    f"{self.key}={self.source}: answers follow a template, which is not set. Set "
                    "it, or remove answers."
                )
            return self
        if not self.is_model:
            raise ValueError(
                f"{self.key}={self.source}: a template is for models; a function or server gets "
                "prompt, response and the fields of the row. Remove it."
            )
        try:
            names = self.template_fields
        except ValueError:
            names = ()
        if "response" not in names or not all(map(str.isidentifier, names)):
            raise ValueError(
                f"{self.key}={self.source}: template must name fields in single braces, among them "
                f"{{response}}; it is {self.template!r}. Write other braces twice."
            )
        if self.answers is not None and (not all(self.answers) or len(set(self.answers)) < 2):
            raise ValueError(
                f"{self.key}={self.source}: answers must be two different texts; they are "
                f"[{', '.join(self.answers)}]. Change them."
            )
        return self

    @model_validator(mode="after")
    def _address_is_usable(self) -> Self:
        if not self.is_server:
            return self
        try:
            url = urlsplit(self.source)
            usable = bool(url.hostname) and (url.port is None or url.port > 0)
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(
                f"{self.key}={self.source}: must be a web address; its host is missing or its "
                "port is wrong. Write for example http://localhost:8000/score."
            )
        if "@" in url.netloc:
            raise ValueError(
                f"{self.key}={url.scheme}://...@{url.hostname}: must not contain a password, "
                "which would be saved with the run; it does. Put a token into MARLHF_REWARD_TOKEN."
            )
        return self


class RewardTerm(RewardSource):
    """One source of reward."""

    weight: float = 1.0
    """Factor of this source's scores."""


class RewardConstraint(RewardSource):
    """A judge whose score must reach a threshold."""

    key: ClassVar[str] = "reward.constraints"
    threshold: float
    """The smallest score that satisfies it."""


def _one_term(value: object) -> object:
    if isinstance(value, str):
        return ({"source": value},)
    return (value,) if isinstance(value, dict) else value


class DenseTerm(RewardSource):
    """A model that rewards tokens before the last one."""

    key: ClassVar[str] = "reward.dense"
    kind: DenseReward
    """`rto`: every token, by log p of a DPO model less that of the reference. `sentence`, `clause`:
    the last token of each, by a reward model's score of the response so far; clauses also end at
    commas, colons and semicolons."""
    weight: float = 1.0
    """Factor of its rewards."""
    clip: float | None = Field(None, gt=0)
    """The weighted reward of a token is clipped to +- this. None means no clipping."""

    @model_validator(mode="after")
    def _is_a_model(self) -> Self:
        if not self.is_model or self.template is not None:
            raise ValueError(
                f"{self.key}={self.source}: must be a model, without a template, since it rewards "
                "tokens. Give the directory of one."
            )
        return self

    @property
    def is_language(self) -> bool:
        """Whether it is a language model."""
        return self.kind == "rto"


def _one_name(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class RewardConfig(Section):
    """Reward of a response: that of its sources combined, then shaped, normalised and clipped."""

    source: Annotated[tuple[RewardTerm, ...], BeforeValidator(_one_term)] = ()
    """A path, import path or address, or a list of `{source, weight, ...}`."""
    combine: Combination = "sum"
    """How the weighted scores of several sources become one: their sum; for an ensemble a mixture
    of mean and minimum (`robust`); the scores of the source with the smallest mean over the step
    (`maxmin`), a source for each group of users."""
    robust_weight: float = Field(0.5, ge=0, le=1)
    """Weight of the mean in `robust`; the rest is that of the minimum."""
    constraints: Annotated[tuple[RewardConstraint, ...], BeforeValidator(_one_term)] = ()
    """Judges that must agree, a list of `{source, threshold, ...}`. A response
    that violates one earns nothing, and no update makes it likelier."""
    shaping: Annotated[tuple[Shaping, ...], BeforeValidator(_one_name)] = ()
    """What is done to the scores first, in this order: a name or a list. `par` and
    `center_reference` compare them with the scores of reference responses, `z_score` standardises
    those of a step; `length_penalty`, `overlong`: see their keys."""
    reference_field: str = Field("references", min_length=1)
    """Field of the data rows with the reference responses to the prompt: a text, or a list. The
    sources score them. `response` takes those that `marlhf generate` wrote."""
    par_scale: float = Field(1.0, gt=0)
    """Factor in the sigmoid of `par`."""
    length_coef: float = Field(0.0, ge=0)
    """What `length_penalty` subtracts for each token above `reward.length_limit`."""
    length_limit: int = Field(0, ge=0)
    """Tokens of a response that `length_penalty` leaves free."""
    overlong_buffer: int | None = Field(None, gt=0)
    """Tokens before `rollout.max_response_tokens` over which the penalty of `overlong` grows. None
    means a fifth of the limit."""
    overlong_factor: float = Field(1.0, gt=0)
    """What `overlong` subtracts at the limit."""
    clip: float | None = Field(None, gt=0)
    """Normalised scores are clipped to +- this. None means no clipping."""
    normalize: ScoreNormalization = "none"
    """Divide scores by the running standard deviation of all scores so far (`running_scale`), after
    subtracting their mean (`running`)."""
    missing_eos: MissingEos = "none"
    """What happens to the score of a response without an end token."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Amount to subtract from the score (`subtract`), or whose negative replaces it (`replace`)."""
    dense: Annotated[tuple[DenseTerm, ...], BeforeValidator(_one_term)] = ()
    """Rewards of other tokens than the last, a list of `{source, kind, weight, clip}`. They are
    added as they are; scores, also those of held-out responses, are without them."""
    max_invalid_fraction: float = Field(0.5, ge=0, le=1)
    """Largest share of responses without a score. A step with more stops the run."""

    @property
    def judges(self) -> tuple[RewardSource, ...]:
        """All that judge: sources, then constraints, then dense rewards."""
        return (*self.source, *self.constraints, *self.dense)

    @property
    def models(self) -> tuple[RewardSource, ...]:
        """The judges that are models, in the order of `judges`."""
        return tuple(judge for judge in self.judges if judge.is_model)

    @property
    def critic_model(self) -> int | None:
        """Which of `models` a critic may start from; None: there is none."""
        scored = (
            number
            for number, judge in enumerate(self.models)
            if judge in self.source and not judge.is_language
        )
        return next(scored, None)

    @property
    def compares_references(self) -> bool:
        """Whether reference responses are scored too."""
        return not {"par", "center_reference"}.isdisjoint(self.shaping)


class EvaluateConfig(Section):
    """Generation on held-out prompts, before, during and after training."""

    interval: int = Field(0, ge=0)
    """Steps between evaluations. 0 means only at the end."""
    patience: int | None = Field(None, gt=0)
    """Evaluations in a row that are no better by `checkpoint.keep_best`, after which the run ends.
    None means that it takes all its steps."""
    num_prompts: int = Field(256, gt=0)
    """Held-out prompts to use, from the start of the validation file."""
    samples_per_prompt: int = Field(1, gt=0)
    """Responses to each prompt. A prompt's results are means over them. With several, distinct-n
    says how different they are: those to one prompt, and the first ones to all prompts."""
    self_bleu: bool = False
    """Also the BLEU of these responses against each other (across prompts, of the first 64), by the
    package sacrebleu."""
    batch_size: int = Field(64, gt=0)
    """Sequences generated together, over all ranks. sft and reward use their microbatches
    instead."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature. 0 means greedy."""
    gold: str | None = None
    """Code reward, as in `reward.source`, that judges the responses and is never trained on. None
    means no second judge."""
    against: str | None = None
    """Another policy of the same architecture and tokenizer: a run directory or Hugging Face
    folder. `marlhf evaluate` has it answer the same prompts with the same draws and compares. None
    means no comparison."""


class CheckpointConfig(Section):
    """Checkpoints and exported models."""

    interval: int = Field(0, ge=0)
    """Steps between checkpoints. 0 means only at the end."""
    keep: int = Field(2, gt=0)
    """Number of newest checkpoints to keep."""
    keep_every: int = Field(0, ge=0)
    """Keep checkpoints of multiples of this many steps as well. 0 means none."""
    keep_best: str | None = None
    """Held-out metric, such as `eval/score_mean` or `eval/loss`, whose best checkpoint is kept as
    well, saved where it is evaluated, and exported at the end. None means the last one."""
    async_save: bool = False
    """Write in the background, from a copy in host memory as large as the checkpoint."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Whether to resume from the newest checkpoint in `run.dir`: if there is one, never, or else
    fail. `never` is about earlier launches: a restart after a fault resumes from its own launch."""
    allow_changed: tuple[str, ...] = ()
    """Keys (`policy.lr`) or sections (`reward`) that may differ from those of the checkpoint."""
    export_hf: bool = True
    """Write Hugging Face folders to `run.dir`/hf at the end."""
    export_from_first: bool = False
    """Write exports from the first rank only, as is done anyway where several hosts export to NFS,
    FUSE or SMB, which must not have several writers of one file."""
    import_once: bool = False
    """Let only the first data-parallel replica read Hugging Face files and send their parts to the
    others: for slow file systems."""


START = "start-up"
"""The watchdog's first phase; it ends where the first step begins."""
_NO_LIMIT_SECONDS = 366 * 24 * 3600.0


class WatchdogConfig(Section):
    """Time limit of each phase, after which the run is taken to hang and is ended."""

    seconds: float | None = Field(1800, gt=0)
    """Limit of any phase without one of its own. None means no limit."""
    rollout_seconds: float | None = Field(None, gt=0)
    """Generation. None means `watchdog.seconds`, here and below."""
    experience_seconds: float | None = Field(None, gt=0)
    """Scores, log-probs, values and advantages."""
    update_seconds: float | None = Field(None, gt=0)
    """All optimizer steps of a PPO step; one of sft, reward, preference and offline."""
    evaluate_seconds: float | None = Field(None, gt=0)
    """One evaluation."""
    checkpoint_seconds: float | None = Field(None, gt=0)
    """One save; start-up, which may read one, has no less. None means `watchdog.seconds`, or what
    the checkpoint takes at 250 MB/s if that is more, as for 1.9 TB (two hours)."""
    export_seconds: float | None = Field(None, gt=0)
    """Export of Hugging Face folders at the end. None as for a save."""

    @property
    def collective_seconds(self) -> float:
        """Timeout of collectives: longer than any phase, so that the watchdog acts first."""
        if self.seconds is None:
            return _NO_LIMIT_SECONDS
        return max(filter(None, [1800.0, *self.model_dump().values()])) + 60

    def limit_of(self, phase: str) -> tuple[str, float | None]:
        """Return the key that limits a phase, and its limit in seconds."""
        if phase == START and self.seconds is not None:
            phase = "checkpoint" if (self.checkpoint_seconds or 0) > self.seconds else phase
        own = getattr(self, f"{phase}_seconds", None)
        return (
            ("watchdog.seconds", self.seconds)
            if own is None
            else (f"watchdog.{phase}_seconds", own)
        )


class LoggingConfig(Section):
    """What a run writes besides checkpoints."""

    samples: int = Field(4, ge=0)
    """Prompts and responses that each interval adds to samples.jsonl."""
    samples_interval: int = Field(10, gt=0)
    """Steps between samples, and between lines of macro_actions.jsonl."""
    interval: int | None = Field(None, gt=0)
    """Steps between lines on screen. None means every step of ppo and every tenth of the other
    jobs. The bar of a terminal moves with every step, and evaluations are always shown."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Weights & Biases project. None means off."""


class Config(Section):
    """The complete configuration of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    memory: MemoryConfig = MemoryConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    policy: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    sft: SftConfig = SftConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    macro: MacroConfig = MacroConfig()
    ppo: PPOConfig = PPOConfig()
    preference: PreferenceConfig = PreferenceConfig()
    offline: OfflineConfig = OfflineConfig()
    reward: RewardConfig = RewardConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def has_reference(self) -> bool:
        """Whether ppo asks the policy's first weights: for a penalty, macro actions or a reward."""
        ppo = self.ppo
        asked = any(term.kind == "rto" for term in self.reward.dense)
        asked |= ppo.kl_coef > 0 or ppo.kl_loss_coef > 0
        return asked or self.macro.rule == "perplexity"

    @property
    def rollout_parallel(self) -> ParallelConfig:
        """Degrees during generation: those of training unless the rollout has its own."""
        tensor = self.rollout.tensor_size or self.parallel.tensor_size
        pipeline = self.rollout.pipeline_size or self.parallel.pipeline_size
        if (tensor, pipeline) == (self.parallel.tensor_size, self.parallel.pipeline_size):
            return self.parallel.generating
        return ParallelConfig(
            tensor_size=tensor,
            pipeline_size=pipeline,
            expert_size=self.parallel.expert_size,
            # Megatron-Core requires it with experts; generation itself switches it off.
            sequence_parallel=self.model.num_experts is not None and tensor > 1,
        )

    @property
    def moves_weights(self) -> bool:
        """Whether ranks that train receive weights other than their own to generate."""
        return self.rollout_parallel != self.parallel.generating

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        """Set what a preset stands for, unless the user has."""
        macro = values.get("macro") if isinstance(values, dict) else None
        if not isinstance(macro, dict) or macro.get("compat") != "ma_rlhf":
            return values
        ppo = values.get("ppo") or {}
        return values | {
            "macro": {"reward": "mean"} | macro,
            "ppo": {"whiten_advantages": False} | ppo if isinstance(ppo, dict) else ppo,
        }

    @model_validator(mode="after")
    def _preset_is_kept(self) -> Self:
        if self.macro.compat != "ma_rlhf":
            return self
        for key, value, wanted in (
            ("macro.reward", self.macro.reward, "mean"),
            ("ppo.whiten_advantages", self.ppo.whiten_advantages, False),
        ):
            if value != wanted:
                shown = str(value).lower()
                raise ValueError(
                    f"{key}={shown}: must be {str(wanted).lower()} with macro.compat=ma_rlhf, "
                    "which reproduces the released code. Remove one of the two."
                )
        return self

    @model_validator(mode="after")
    def _one_warmup_each(self) -> Self:
        for name in ("policy", "critic", "reward_model"):
            optimizer = getattr(self, name)
            if optimizer.warmup_steps and optimizer.warmup_ratio:
                raise ValueError(
                    f"{name}.warmup_ratio={optimizer.warmup_ratio:g}: replaces warmup_steps, "
                    f"which is {optimizer.warmup_steps}. Remove one of the two."
                )
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.rollout.batch_size % self.rollout.samples_per_prompt:
            raise ValueError(
                f"rollout.batch_size={self.rollout.batch_size}: must be a multiple of "
                f"rollout.samples_per_prompt={self.rollout.samples_per_prompt}. Change one of them."
            )
        if self.parallel.sequence_parallel and self.parallel.tensor_size == 1:
            raise ValueError(
                "parallel.sequence_parallel=true: needs parallel.tensor_size > 1; it is 1. "
                "Set it to false."
            )
        for key in self.checkpoint.allow_changed:
            section, _, name = key.partition(".")
            known = getattr(self, section) if section in type(self).model_fields else None
            if known is None or (name and name not in type(known).model_fields):
                raise ValueError(
                    f"checkpoint.allow_changed=[{key}]: must name keys or sections; there is no "
                    f"{key}. Write for example [policy.lr,reward]."
                )
        return self
