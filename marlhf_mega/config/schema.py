"""Every key of a run's configuration, with its unit, its range and its default."""

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.section import Section, spell_off


class RunConfig(Section):
    """Identity and length of a run."""

    name: str = "run"
    """Shown in logs and the report."""
    dir: Path = Path("runs/run")
    """Run directory: config, metrics, samples, checkpoints, exported models, report."""
    seed: int = Field(1234, ge=0)
    """Every random draw is a function of (seed, step, global sample index)."""
    steps: int | None = Field(None, gt=0)
    """Optimizer steps (sft, reward) or PPO steps; none: one pass over the training data."""
    max_skipped_steps: int = Field(3, ge=0)
    """Optimizer steps with a gradient that is not finite, in a row, before the run stops."""
    max_hours: float | None = Field(None, gt=0)
    """Save and end with code 75 at the first step that ends after this time; none: no limit."""
    max_attempts: int = Field(5, gt=0)
    """Starts by a launcher from the same step before the run ends with code 76: no progress."""


class ParallelConfig(Section):
    """Degrees of parallelism. The data-parallel size is what is left of the world."""

    tensor_size: int = Field(1, gt=0)
    """Ranks that share every matrix."""
    pipeline_size: int = Field(1, gt=0)
    """Stages the layers are cut into."""
    virtual_pipeline_size: int = Field(1, gt=0)
    """Chunks of layers per stage (interleaved schedule); 1: the plain 1F1B schedule."""
    context_size: int = Field(1, gt=0)
    """Ranks that share every sequence, for long ones; while generating each is a replica."""
    expert_size: int = Field(1, gt=0)
    """Ranks the experts of a layer are spread over."""
    sequence_parallel: bool = False
    """Norms and residuals are split along the sequence over the tensor-parallel ranks."""
    overlap: bool = False
    """Gradients are reduced and new weights gathered while passes compute; for data parallelism."""

    @property
    def model_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor_size * self.pipeline_size * self.context_size

    @property
    def generating(self) -> "ParallelConfig":
        """The degrees while the same ranks generate with the weights where they are.

        Sequences that grow token by token are not shared.
        """
        return self.model_copy(update={"context_size": 1})


class PrecisionConfig(Section):
    """Number formats."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations (`auto`: bfloat16 on GPUs, float32 on CPUs); masters: float32."""
    fp8: Annotated[Literal["off", "hybrid", "e4m3"], BeforeValidator(spell_off)] = "off"
    """Matrix products in FP8 through Transformer Engine; `hybrid`: e5m2 gradients."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 scales are found; the default keeps no state between steps."""
    fp8_param_gather: bool = False
    """Weights of models that learn live and travel in FP8; only their float32 masters are exact."""
    fp8_edge_layers_bf16: int = Field(0, ge=0)
    """So many of the first and of the last layers stay in bfloat16; not with `delayed`."""
    fp8_frozen: bool = False
    """Reference and reward models run in FP8 too; otherwise in `dtype`."""
    fp8_check_interval: int = Field(0, ge=0)
    """ppo: steps between comparisons of a microbatch with and without FP8; 0: none."""
    fp8_max_logprob_gap: float = Field(0.1, gt=0)
    """Largest mean difference of log-probs that a comparison may find, in nats per token."""
    fp8_min_cosine: float = Field(0.9, ge=-1, le=1)
    """Lowest cosine between the two gradients that it may find."""
    fp8_on_divergence: Literal["warn", "leave"] = "warn"
    """What follows where it finds more: a warning, or also the rest of the run without FP8."""

    @property
    def fp8_alignment(self) -> int:
        """FP8 matrix products take rows and columns in multiples of this; 1 without FP8."""
        if self.fp8 == "off":
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    def frozen(self) -> Self:
        """Return the formats of a model that does not learn."""
        fp8 = self.fp8 if self.fp8_frozen else "off"
        return self.model_copy(update={"fp8": fp8, "fp8_param_gather": False})


class MemoryConfig(Section):
    """What is given up for device memory. No number of a run depends on it."""

    recompute: Literal["none", "selective", "full"] = "none"
    """What of a layer is computed again in the backward pass of models that learn: nothing,
    the inside of attention (of use with softcaps: fused kernels keep little), or all of it."""
    recompute_num_layers: int | None = Field(None, gt=0)
    """`full`: layers of each stage's chunk that are; none: all."""
    offload_idle: bool = False
    """ppo: reference, reward models and critic leave the device while no phase needs them."""
    offload_optimizer: bool = False
    """ppo: master weights, moments and gradients leave the device outside of updates."""


class TokenizerConfig(Section):
    """Text to token ids."""

    path: Path | None = None
    """A sentencepiece .model file or a Hugging Face tokenizer folder; none: `model.hf_path`."""


class DataConfig(Section):
    """Training and validation files (.jsonl, .jsonl.gz, .parquet)."""

    train_path: Path | None = None
    """Training rows of the job's kind."""
    validation_path: Path | None = None
    """Held-out rows of the same kind."""
    max_prompt_tokens: int = Field(512, gt=0)
    """Longest prompt."""
    max_response_tokens: int = Field(512, gt=0)
    """Longest response of sft and preference rows; longer ones are cut and counted."""
    long_prompts: Literal["error", "drop", "truncate"] = "error"
    """What happens to a longer prompt: refuse to start, drop and count, or keep its end."""
    shuffle: bool = True
    """Draw rows in a new order every epoch."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(1e-5, gt=0)
    """Highest learning rate."""
    min_lr: float = Field(0.0, ge=0)
    """Where a decaying schedule ends."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up, over all optimizer steps of the run."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps from 0 to `lr`."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled; not applied to norms and biases."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's first moment."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Adam's second moment."""
    eps: float = Field(1e-8, gt=0)
    """Adam's epsilon."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest global gradient norm; 0: no clipping."""


class SftConfig(Section):
    """Supervised fine-tuning. The optimizer is `policy`'s."""

    batch_size: int = Field(64, gt=0)
    """Sequences per optimizer step, over all ranks."""
    microbatch_size: int = Field(8, gt=0)
    """Sequences per forward on one data-parallel rank."""
    packing: bool = False
    """Sequences of a microbatch lie one after the other in one row, without padding."""


class RewardModelConfig(OptimizerConfig):
    """Training of a reward model from preference pairs."""

    batch_size: int = Field(64, gt=0)
    """Pairs per optimizer step, over all ranks."""
    microbatch_size: int = Field(8, gt=0)
    """Pairs per forward on one data-parallel rank."""
    packing: bool = False
    """Sequences of a microbatch lie one after the other in one row, without padding."""
    loss: Literal["last", "span"] = "last"
    """Bradley-Terry on the last token's score, or on every token after the first difference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a label is taken to be wrong."""
    center_coef: float = Field(0.0, ge=0)
    """Weight of (chosen + rejected)^2, which keeps scores near zero."""


class CriticConfig(OptimizerConfig):
    """The critic's optimizer and origin."""

    init: str = "reward"
    """`reward` (the first learned reward model), `policy` (its body), or a run directory."""
    warmup_ppo_steps: int = Field(0, ge=0)
    """PPO steps in which only the critic learns."""


class RolloutConfig(Section):
    """Generation."""

    batch_size: int = Field(64, gt=0)
    """Sequences per PPO step, over all ranks."""
    max_response_tokens: int = Field(64, gt=0)
    """Longest response, the end token included."""
    temperature: float = Field(1.0, ge=0)
    """Divides the logits, here and wherever log-probs are recomputed; 0: greedy (not for ppo)."""
    top_k: int = Field(0, ge=0)
    """Keep the k most likely tokens; 0: all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of tokens with this probability."""
    samples_per_prompt: int = Field(1, gt=0)
    """Responses to each prompt; batch_size must be a multiple."""
    slots: int | None = Field(None, gt=0)
    """Sequences decoded together on one data-parallel rank; none: the rank's whole share."""
    ranks: int = Field(0, ge=0)
    """ppo: so many ranks, the last ones, only generate; 0: all ranks train and generate."""
    staleness: Literal[0, 1] = 0
    """1: `ranks` generate the next step's samples while this one's are trained on, by weights that
    are one step old; 0: they wait for the newest weights."""
    cuda_graphs: bool = False
    """Launch each decode step as one CUDA graph; not with experts or FP8."""
    tensor_size: int | None = Field(None, gt=0)
    """Ranks that share every matrix while generating; none: as in training."""
    pipeline_size: int | None = Field(None, gt=0)
    """Stages while generating; none: as in training. Another layout than in training costs a move
    of the weights and their memory in each rollout; fewer stages make more replicas."""


class MacroConfig(Section):
    """Macro actions: which tokens form one action, and how rewards and values are pooled."""

    rule: Literal[
        "token",
        "fixed_ngram",
        "random_ngram",
        "perplexity",
        "parsing",
        "sentence",
        "whole_response",
    ] = "fixed_ngram"
    """Where an action ends. `token` is PPO, `whole_response` a bandit."""
    n: int = Field(5, gt=0)
    """`fixed_ngram`: tokens per action."""
    lengths: tuple[Annotated[int, Field(gt=0)], ...] = Field((2, 3, 5, 10), min_length=1)
    """`random_ngram`: the lengths that are shuffled."""
    repeats: int = Field(3, gt=0)
    """`random_ngram`: how often each length stands in the list."""
    random_mode: Literal["list", "cycle"] = "cycle"
    """`random_ngram`: what follows the list: one last action, or new draws."""
    perplexity: Literal["token", "prefix", "segment"] = "segment"
    """`perplexity`: whose must rise for a new action: the token's, the prefix's, the action's."""
    parser: str = "rules"
    """`parsing`: `rules`, `python` (syntax tree), or an import path `module:factory`."""
    cutoff: int = Field(5, gt=0)
    """`parsing`: a constituent with fewer tokens than this is one action."""
    min_length: int = Field(1, gt=0)
    """Shorter actions are merged into the one before."""
    max_length: int | None = Field(None, gt=0)
    """Longer actions are split."""
    eos: Literal["join", "own"] = "join"
    """Whether the end token belongs to the last action or is its own."""
    value: Literal["equal", "unit", "position", "position_repo", "first"] = "equal"
    """How token values become the value of an action."""
    reward: Literal["sum", "mean"] = "sum"
    """How token rewards become the action's; `mean` divides the KL penalty by its length."""
    ratio: Literal["token", "macro", "macro_geo"] = "token"
    """Likelihood ratio: per token, of the whole action, or its geometric mean."""
    discount: Literal["per_macro", "per_token"] = "per_macro"
    """Whether gamma counts actions or tokens."""
    lambda_unit: Literal["per_macro", "per_token"] = "per_macro"
    """Whether lambda counts actions or tokens."""
    value_target: Literal["token", "macro"] = "token"
    """Whether every token's value or the pooled value regresses to the action's return."""
    compat: Literal["none", "ma_rlhf"] = "none"
    """`ma_rlhf`: the released code's boundaries, empty actions and pooled rewards included; the
    reward is then the mean, and advantages are not whitened."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> "MacroConfig":
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(
                f"macro.max_length={self.max_length}: must be at least macro.min_length="
                f"{self.min_length}. Raise it, or lower macro.min_length."
            )
        return self


class PPOConfig(Section):
    """The PPO update."""

    epochs: int = Field(1, gt=0)
    """Passes over one rollout batch."""
    minibatch_size: int = Field(64, gt=0)
    """Sequences per optimizer step, over all ranks."""
    microbatch_size: int = Field(8, gt=0)
    """Sequences per forward on one data-parallel rank."""
    microbatch_tokens: int | None = Field(None, gt=0)
    """Tokens per forward, with the padding if there is any, instead of `microbatch_size`: short
    sequences go many at a time, and every data-parallel rank gets about as many tokens of each
    minibatch."""
    scoring_microbatch_factor: int = Field(1, gt=0)
    """Times as many sequences, or tokens, per forward of which nothing is kept for a backward pass:
    log-probs, values and scores of the experience, and evaluation."""
    packing: bool = False
    """Sequences of a microbatch lie one after the other in one row, without padding."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Trace of generalised advantage estimation."""
    clip_range: float = Field(0.2, gt=0)
    """Ratio is clipped to 1 +- this."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound of the loss for negative advantages; none: off."""
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    """Log-probs at rollout: computed again as in training, or as the sampler found them, which
    saves one of the scoring passes and shows neither entropy nor the gap between the two."""
    sampler_cap: float | None = Field(None, ge=1)
    """Weigh each term by how much likelier the trainer finds it than the sampler did, at most
    this; none: off."""
    value_clip_range: float | None = Field(0.2, gt=0)
    """New values are clipped to old +- this; none: off."""
    kl_coef: float = Field(0.05, ge=0)
    """Penalty on the divergence from the reference, inside the reward."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Estimator of the penalty in the reward."""
    kl_target: float | None = Field(None, gt=0)
    """Adaptive coefficient: the divergence per response it steers to; none: fixed."""
    kl_horizon: int = Field(10000, gt=0)
    """Adaptive coefficient: samples over which it reacts."""
    kl_loss_coef: float = Field(0.0, ge=0)
    """Penalty on the divergence inside the loss."""
    kl_loss_estimator: Literal["k2", "k3_straight_through"] = "k2"
    """Estimator of the penalty in the loss."""
    entropy_coef: float = Field(0.0, ge=0)
    """Bonus on the policy's entropy."""
    whiten_advantages: bool = True
    """Shift and scale advantages by the moments of the global batch."""
    aggregation: Literal[
        "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "macro_mean"
    ] = "token_mean"
    """What the policy loss is a mean of, over the whole minibatch."""


class OfflineConfig(Section):
    """Advantage Leftover Lunch RL (A-LoL, arXiv 2305.14718). The optimizer is `policy`'s."""

    algorithm: Literal[
        "nll", "wbc", "r_gold", "r_lol", "a_lol", "a_lol_seq", "a_lol_ref_free", "a_lol_kl"
    ] = "a_lol"
    """What weighs a response: nothing, its reward, or its advantage and likelihood ratio."""
    sampling: Literal["good_priority", "good_random", "all"] = "good_priority"
    """Draw rows by their positive advantage, uniformly among those, or all in turn."""
    clip_range: float | None = Field(0.9, gt=0)
    """Likelihood ratios are clipped to 1 +- this; none: off."""
    kl_coef: float = Field(0.0, ge=0)
    """`a_lol_kl`: weight of the divergence from the first policy."""
    batch_size: int = Field(64, gt=0)
    """Responses per optimizer step, over all ranks."""
    microbatch_size: int = Field(8, gt=0)
    """Responses per forward on one data-parallel rank."""
    packing: bool = False
    """Sequences of a microbatch lie one after the other in one row, without padding."""
    value_epochs: int = Field(10, gt=0)
    """Passes of the critic over the validation prompts before the policy learns."""

    @property
    def needs_values(self) -> bool:
        """Whether advantages are used."""
        return self.algorithm.startswith("a_lol") or self.sampling != "all"

    @property
    def needs_reference(self) -> bool:
        """Whether the first policy's log-probs are used."""
        return self.algorithm in ("r_lol", "a_lol", "a_lol_seq", "a_lol_kl")


class RewardTerm(Section):
    """One source of reward."""

    source: str
    """A reward model (run directory or Hugging Face folder), a rule `module:function`, or the
    address of a server, `http://...` (its bearer token: MARLHF_REWARD_TOKEN)."""
    weight: float = 1.0
    """Factor in the sum."""
    timeout_seconds: float = Field(10.0, gt=0)
    """Rule: time for one response; server: for one request. Beyond it samples are masked."""
    sandbox: Annotated[Literal["namespaces", "off"], BeforeValidator(spell_off)] = "namespaces"
    """Rule that runs programs of the model: how; `off`: with all rights of this user."""

    @property
    def is_rule(self) -> bool:
        """Whether `source` is an import path."""
        module, _, function = self.source.partition(":")
        return function.isidentifier() and all(p.isidentifier() for p in module.split("."))

    @property
    def is_server(self) -> bool:
        """Whether `source` is a web address."""
        return self.source.startswith(("http://", "https://"))

    @property
    def is_model(self) -> bool:
        """Whether `source` is a reward model, which runs on the ranks."""
        return not self.is_rule and not self.is_server

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
                f"reward.source={self.source}: must be an address; it has no host or a wrong "
                "port. Write for example http://localhost:8000/score."
            )
        if "@" in url.netloc:
            raise ValueError(
                f"reward.source={url.scheme}://...@{url.hostname}: must not hold a password, which "
                "would be saved with the run; it does. Put a token into MARLHF_REWARD_TOKEN."
            )
        return self


def _one_term(value: object) -> object:
    if isinstance(value, str):
        return ({"source": value},)
    return (value,) if isinstance(value, dict) else value


class RewardConfig(Section):
    """The reward of a response: a weighted sum of sources, shaped."""

    source: Annotated[tuple[RewardTerm, ...], BeforeValidator(_one_term)] = ()
    """A path, import path or address, or a list of `{source, weight, timeout_seconds}`."""
    clip: float | None = Field(None, gt=0)
    """Scores are clipped to +- this after normalisation."""
    normalize: Literal["none", "running", "running_scale"] = "none"
    """Shift and scale by the running moments of all scores so far, or scale only."""
    missing_eos: Literal["none", "subtract", "replace"] = "none"
    """What happens to the score of a response that was cut off."""
    missing_eos_penalty: float = Field(1.0, ge=0)
    """Subtracted from the score (`subtract`), or minus this is the score (`replace`)."""
    max_invalid_fraction: float = Field(0.5, ge=0, le=1)
    """More failed samples than this in one step stop the run."""


class EvaluateConfig(Section):
    """Generation on held-out prompts, before, during and after training."""

    interval: int = Field(0, ge=0)
    """Steps between evaluations; 0: only at the end."""
    num_prompts: int = Field(256, gt=0)
    """Held-out prompts used, from the start of the validation file."""
    batch_size: int = Field(64, gt=0)
    """Sequences generated at once, over all ranks; sft and reward judge by microbatches."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0: greedy."""
    gold: str | None = None
    """Rule `module:function` that judges but never trains."""


class CheckpointConfig(Section):
    """Saved states."""

    interval: int = Field(0, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep: int = Field(2, gt=0)
    """Newest checkpoints that stay."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints after a multiple of this many steps stay too; 0: none."""
    async_save: bool = False
    """Write while the next steps run, from a copy in host memory: as much as a checkpoint has."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on from `run.dir`'s newest checkpoint: if there is one, never, or else refuse to start."""
    allow_changed: tuple[str, ...] = ()
    """Keys (`policy.lr`) or sections (`reward`) that may differ from the checkpoint's run."""
    export_hf: bool = True
    """Write a Hugging Face folder `run.dir`/hf at the end."""
    export_from_first: bool = False
    """The first rank writes exports alone: for file systems on which several hosts must not write
    into one file (NFS, FUSE)."""
    import_once: bool = False
    """The first data-parallel replica reads Hugging Face files and sends the others their parts:
    for slow file systems."""


class WatchdogConfig(Section):
    """The longest that each phase may take before the run is taken to hang, and ended."""

    seconds: float | None = Field(1800, gt=0)
    """Any phase that has no limit of its own here; none: no limit."""
    rollout_seconds: float | None = Field(None, gt=0)
    """Generation; none, as below: `watchdog.seconds`."""
    experience_seconds: float | None = Field(None, gt=0)
    """Scores, log-probs, values and advantages."""
    update_seconds: float | None = Field(None, gt=0)
    """The optimizer steps; sft, reward, offline: one."""
    evaluate_seconds: float | None = Field(None, gt=0)
    """One evaluation."""
    checkpoint_seconds: float | None = Field(None, gt=0)
    """One save."""
    export_seconds: float | None = Field(None, gt=0)
    """Writing Hugging Face folders at the end."""

    @property
    def collective_seconds(self) -> float:
        """How long a rank waits for another: longer than any phase, so that the watchdog acts."""
        return max(filter(None, [1800.0, *self.model_dump().values()])) + 60

    def limit_of(self, phase: str) -> tuple[str, float | None]:
        """Return the key that limits a phase, and the limit in seconds."""
        own = getattr(self, f"{phase}_seconds", None)
        return (
            ("watchdog.seconds", self.seconds)
            if own is None
            else (f"watchdog.{phase}_seconds", own)
        )


class LoggingConfig(Section):
    """What is written besides checkpoints."""

    samples: int = Field(4, ge=0)
    """Prompts and responses written to samples.jsonl per interval."""
    samples_interval: int = Field(10, gt=0)
    """Steps between samples."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: str | None = None
    """Weights & Biases project; none: off."""


class Config(Section):
    """One run, resolved."""

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
    offline: OfflineConfig = OfflineConfig()
    reward: RewardConfig = RewardConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def rollout_parallel(self) -> ParallelConfig:
        """The degrees while generating: those of training unless the rollout has its own."""
        tensor = self.rollout.tensor_size or self.parallel.tensor_size
        pipeline = self.rollout.pipeline_size or self.parallel.pipeline_size
        if (tensor, pipeline) == (self.parallel.tensor_size, self.parallel.pipeline_size):
            return self.parallel.generating
        return ParallelConfig(
            tensor_size=tensor,
            pipeline_size=pipeline,
            expert_size=self.parallel.expert_size,
            # Experts ask for it; generation then does without, whatever the model.
            sequence_parallel=self.model.num_experts is not None and tensor > 1,
        )

    @property
    def moves_weights(self) -> bool:
        """Whether ranks that train fetch other weights than their own to generate."""
        return self.rollout_parallel != self.parallel.generating

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
