"""What a person sees: a live line on a terminal, one plain line per step elsewhere, tables."""

import logging
import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from marlhf_mega.config.schema import Config, OfflineConfig, RewardModelConfig, SftConfig

logger = logging.getLogger(__name__)

Job = Literal["sft", "reward", "ppo", "offline"]

SHOWN: dict[Job, dict[str, str]] = {
    "sft": {"loss": "sft/loss", "lr": "policy/lr", "tok/s": "perf/tokens_per_second"},
    "reward": {
        "loss": "reward/loss",
        "accuracy": "reward/accuracy",
        "lr": "reward/lr",
        "tok/s": "perf/tokens_per_second",
    },
    "offline": {
        "loss": "offline/loss",
        "advantage": "offline/advantage",
        "KL": "offline/kl",
        "tok/s": "perf/tokens_per_second",
    },
    "ppo": {
        "score": "rollout/score_mean",
        "KL": "policy/kl",
        "length": "rollout/response_tokens",
        "clipped": "policy/clip_fraction",
        "explained": "critic/explained_variance",
        "s/step": "time/step_seconds",
    },
}
"""The few numbers that matter in each job, under the name they are shown by."""


class Progress:
    """Shows each finished step: a live bar on a terminal, a line in the log elsewhere."""

    def __init__(
        self, job: Job, *, num_steps: int, first_step: int = 0, console: Console | None = None
    ) -> None:
        """Take the job, its last step and the step it starts from (above 0 after a resume)."""
        self._job = job
        self._num_steps = num_steps
        console = console or Console()
        self._bar = (
            RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=console,
            )
            if console.is_terminal
            else None
        )
        if self._bar:
            self._task = self._bar.add_task(
                job, total=num_steps, completed=first_step, numbers="starting"
            )

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that step `step` (counted from 0) is finished."""
        names = SHOWN[self._job].items()
        shown = [f"{label} {number(metrics[name])}" for label, name in names if name in metrics]
        if self._bar:
            self._bar.update(self._task, completed=step + 1, numbers="  ".join(shown))
        else:
            line = "  ".join(shown)
            logger.info("%s step %d/%d  %s", self._job, step + 1, self._num_steps, line)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()


def number(value: float | None) -> str:
    """Write a number with four significant digits, as short as it can be read."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.2e}"


def batch_arithmetic(config: Config, job: Job, *, data_size: int) -> list[tuple[str, str, int]]:
    """Resolve the batch sizes of a job: rows of (what, from which numbers, how many)."""
    if job == "ppo":
        return _ppo_arithmetic(config, data_size)
    section: SftConfig | RewardModelConfig | OfflineConfig
    match job:
        case "sft":
            section, key, item = config.sft, "sft", "sequences"
        case "reward":
            section, key, item = config.reward_model, "reward_model", "pairs"
        case "offline":
            section, key, item = config.offline, "offline", "responses"
    per_rank = section.batch_size // data_size
    return [
        (f"{item} per optimizer step", f"{key}.batch_size", section.batch_size),
        (f"{item} per rank", f"{section.batch_size} / {data_size} data-parallel", per_rank),
        (
            "microbatches per rank",
            f"{per_rank} / microbatch {section.microbatch_size}",
            -(-per_rank // section.microbatch_size),
        ),
    ]


def _ppo_arithmetic(config: Config, data_size: int) -> list[tuple[str, str, int]]:
    rollout, ppo = config.rollout, config.ppo
    minibatches = rollout.batch_size // ppo.minibatch_size
    per_rank = ppo.minibatch_size // data_size
    return [
        (
            "prompts per PPO step",
            f"{rollout.batch_size} / {rollout.samples_per_prompt} samples each",
            rollout.batch_size // rollout.samples_per_prompt,
        ),
        ("sequences per PPO step", "rollout.batch_size", rollout.batch_size),
        (
            "sequences per rank",
            f"{rollout.batch_size} / {data_size} data-parallel",
            rollout.batch_size // data_size,
        ),
        (
            "optimizer steps per PPO step",
            f"{ppo.epochs} epochs x {rollout.batch_size} / minibatch {ppo.minibatch_size}",
            ppo.epochs * minibatches,
        ),
        (
            "microbatches per optimizer step and rank",
            f"{ppo.minibatch_size} / {data_size} data-parallel / microbatch {ppo.microbatch_size}",
            -(-per_rank // ppo.microbatch_size),
        ),
    ]


def show_batch_arithmetic(
    rows: Sequence[tuple[str, str, int]], *, console: Console | None = None
) -> None:
    """Show the batch arithmetic as a table."""
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(style="dim")
    table.add_column(justify="right")
    for what, source, count in rows:
        table.add_row(what, source, str(count))
    (console or Console()).print(table)


def show_before_after(
    rows: Sequence[tuple[str, float | None, float | None]],
    *,
    columns: tuple[str, str] = ("before", "after"),
    console: Console | None = None,
) -> None:
    """Show (what, before, after) as a table with the difference."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("held-out prompts")
    for heading in (*columns, "change"):
        table.add_column(heading, justify="right")
    for what, before, after in rows:
        change = None if before is None or after is None else after - before
        sign = "+" if change is not None and change > 0 else ""
        table.add_row(what, number(before), number(after), sign + number(change))
    (console or Console()).print(table)
