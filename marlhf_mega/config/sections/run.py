"""Identity, length, evaluation, checkpoints, time limits and logs of a run."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from marlhf_mega.config.section import Section


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
    best_of_n: bool = False
    """Judge only the response to a prompt that has the highest score (best-of-n sampling). Needs a
    `reward.source`; diversity is still that of all."""
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
