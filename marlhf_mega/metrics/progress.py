"""Output for people: steps and held-out results on a terminal, or as lines of the log."""

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column, Table
from rich.text import Text

from marlhf_mega.config.checks import TrainingJob
from marlhf_mega.metrics.format import compact, duration
from marlhf_mega.metrics.glossary import (
    Metric,
    change_name,
    clear_change,
    is_beside,
    lookup,
    order,
    stderr_name,
)

logger = logging.getLogger(__name__)

TERMINAL_METRICS: dict[TrainingJob, dict[str, str]] = {
    "sft": {
        "loss": "sft/loss",
        "grad": "policy/grad_norm",
        "lr": "policy/lr",
        "tok/s": "perf/tokens_per_second",
        "s/step": "time/step_seconds",
    },
    "reward": {
        "loss": "reward/loss",
        "acc %": "reward/accuracy",
        "margin": "reward/margin",
        "grad": "reward/grad_norm",
        "lr": "reward/lr",
        "tok/s": "perf/tokens_per_second",
        "s/step": "time/step_seconds",
    },
    "preference": {
        "loss": "preference/loss",
        "acc %": "preference/accuracy",
        "margin": "preference/margin",
        "nll": "preference/nll",
        "grad": "policy/grad_norm",
        "lr": "policy/lr",
        "tok/s": "perf/tokens_per_second",
        "s/step": "time/step_seconds",
    },
    "offline": {
        "loss": "offline/loss",
        "adv": "offline/advantage",
        "KL": "offline/kl",
        "grad": "policy/grad_norm",
        "lr": "policy/lr",
        "tok/s": "perf/tokens_per_second",
        "s/step": "time/step_seconds",
    },
    "ppo": {
        "score": "rollout/score_mean",
        "KL": "policy/kl",
        "length": "rollout/response_tokens",
        "actions": "macro/actions_per_response",
        "tok/act": "macro/tokens_per_action",
        "clip %": "policy/clip_fraction",
        "explain": "critic/explained_variance",
        "s/step": "time/step_seconds",
        "entropy": "policy/entropy",
        "cut %": "rollout/truncated_fraction",
        "grad": "policy/grad_norm",
        "lr": "policy/lr",
        "tok/s": "perf/tokens_per_second",
    },
}
"""The metrics that matter most in each job, the most telling first: short label -> metric.

A screen shows as many as fit its width.
"""

LOG_WIDTH = 80
"""Columns of a log: what is in a file or in a narrow window is the same."""

_INDENT = "  "
_CELL = 8
_LINES_PER_HEADER = 20


class Progress:
    """Shows finished steps and held-out results.

    On a terminal: a bar that stays at the bottom, and above it a line for every `interval` steps,
    which is history to scroll through. Elsewhere: lines of the log.
    """

    def __init__(
        self,
        job: TrainingJob,
        *,
        num_steps: int,
        first_step: int = 0,
        interval: int = 1,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take what is shown.

        Args:
            job: decides the metrics.
            num_steps: of the whole run.
            first_step: steps already done, 0 unless resumed.
            interval: steps between two lines.
            console: where to; None means this process's output.
            clock: seconds.
        """
        self._job, self._num_steps, self._interval = job, num_steps, interval
        self._first_step = first_step
        self._left = TimeLeft(num_steps, first_step=first_step, clock=clock)
        self._console = console or Console()
        self._lines_to_header = 0
        self._bar = self._make_bar(first_step) if self._console.is_terminal else None

    def _make_bar(self, first_step: int) -> RichProgress:
        bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[phase]:>10}"),
            _TimeLeftColumn(self._left),
            console=self._console,
            expand=True,
            refresh_per_second=4,
            # Lines of the log go above the bar, unless they go to a file.
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = bar.add_task(
            self._job, total=self._num_steps, completed=first_step, phase="start-up"
        )
        return bar

    def enter(self, phase: str | None) -> None:
        """Show what the run is doing, None between phases."""
        if self._bar and phase is not None:
            self._bar.update(self._task, phase=phase)

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show a finished step.

        Args:
            done: steps done so far, this one included.
            metrics: of the step, held-out results included where there are some.
        """
        self._left.finish(done)
        if self._bar:
            # Now, not at the next tick: every step is seen, however fast they are.
            self._bar.update(self._task, completed=done, refresh=True)
        results = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        if self._is_due(done) or results:
            self._show_step(done, metrics)
        if results:
            self.show_results(done, results)

    def _is_due(self, done: int) -> bool:
        return done % self._interval == 0 or done in (self._first_step + 1, self._num_steps)

    def show_results(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show held-out results after some steps, 0: before training."""
        when = f"after step {done}" if done else "before training"
        show_results(f"held-out, {when}", metrics, console=self._console)
        self._lines_to_header = 0

    def _show_step(self, done: int, metrics: Mapping[str, float]) -> None:
        place = f"{done}/{self._num_steps}"
        if not self._bar:
            shown = [f"{label} {value}" for label, value in self._cells(metrics, LOG_WIDTH)]
            left = duration(self._left.seconds())
            logger.info("%s step %s  left %s  %s", self._job, place, left, "  ".join(shown))
            return
        cells = self._cells(metrics, self._console.width)
        if self._lines_to_header == 0:
            labels = "".join(label.rjust(_CELL) for label, _ in cells)
            self._print("")
            self._print("step".rjust(self._place_width) + labels, style="bold")
            self._lines_to_header = _LINES_PER_HEADER
        self._lines_to_header -= 1
        values = "".join(value.rjust(_CELL) for _, value in cells)
        self._print(place.rjust(self._place_width) + values)

    @property
    def _place_width(self) -> int:
        return len(_INDENT) + max(len("step"), 2 * len(str(self._num_steps)) + 1)

    def _cells(self, metrics: Mapping[str, float], width: int) -> list[tuple[str, str]]:
        """Return the labels and values that fit a width; `-` where a step has none."""
        names = list(TERMINAL_METRICS[self._job].items())[: (width - self._place_width) // _CELL]
        return [
            (label, compact(metrics[name] * lookup(name).scale) if name in metrics else "-")
            for label, name in names
        ]

    def _print(self, line: str, style: str = "") -> None:
        self._console.print(Text(line, style), soft_wrap=True)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
            # A process that is killed could not bring it back.
            self._console.show_cursor()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()


class TimeLeft:
    """Estimates how long a run still takes, from its latest steps and all that is between them."""

    def __init__(
        self, num_steps: int, *, first_step: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the clock, `first_step` steps being done."""
        self._num_steps, self._clock = num_steps, clock
        self._ends = [(first_step, clock())]

    def finish(self, done: int) -> None:
        """Note the end of a step."""
        self._ends.append((done, self._clock()))
        if len(self._ends) > 50:
            del self._ends[0]

    def seconds(self) -> float | None:
        """Return the seconds left; None before the first step is done.

        The first step of a process is slow: it counts only as long as there is no other.
        """
        if len(self._ends) == 1:
            return None
        (first, start), (last, end) = self._ends[len(self._ends) > 2], self._ends[-1]
        per_step = (end - start) / (last - first)
        return max(0.0, per_step * (self._num_steps - last) - (self._clock() - end))


class _TimeLeftColumn(ProgressColumn):
    def __init__(self, left: TimeLeft) -> None:
        super().__init__(Column(no_wrap=True, justify="right"))
        self._left = left

    def render(self, task: Task) -> Text:
        return Text(f"{duration(self._left.seconds())} left", style="progress.remaining")


def results_line(metrics: Mapping[str, float]) -> str:
    """Write held-out results on one line: value, standard error, unit, (change since the start)."""
    return "  ".join(
        " ".join(filter(None, (metric.label, value, metric.unit, change and f"({change})")))
        for metric, value, change in _results(metrics)
    )


def show_results(
    title: str, metrics: Mapping[str, float], *, console: Console | None = None
) -> None:
    """Show held-out results: as a table on a terminal, elsewhere on one line of the log."""
    console = console or Console()
    if console.is_terminal:
        console.print()
        console.print(_results_table(title, metrics))
    else:
        logger.info("%s: %s", title, results_line(metrics))


def _results_table(title: str, metrics: Mapping[str, float]) -> Table:
    rows = _results(metrics)
    table = Table(box=None, padding=(0, 0, 0, len(_INDENT)), header_style="bold")
    table.add_column(title)
    table.add_column("mean ± s.e.", justify="right")
    has_changes = any(change for *_, change in rows)
    if has_changes:
        table.add_column("since the start", justify="right")
    for metric, value, change in rows:
        table.add_row(metric.title, value, *([change] if has_changes else []))
    return table


def _results(metrics: Mapping[str, float]) -> list[tuple[Metric, str, str]]:
    """Return the results that are no changes: how they are shown, value and change."""
    names = sorted((name for name in metrics if not is_beside(name)), key=order)
    return [
        (
            lookup(name),
            lookup(name).with_error(metrics[name], metrics.get(stderr_name(name))),
            _change(name, metrics),
        )
        for name in names
    ]


def _change(name: str, metrics: Mapping[str, float]) -> str:
    """Write the change of a metric since the start with its standard error; empty without one."""
    change, error = (metrics.get(n) for n in (change_name(name), stderr_name(change_name(name))))
    if change is None:
        return ""
    return ("+" if change > 0 else "") + lookup(name).with_error(change, error)


def show_before_after(
    before: Mapping[str, float],
    after: Mapping[str, float],
    names: Sequence[str],
    *,
    columns: tuple[str, str] = ("before", "after"),
    console: Console | None = None,
) -> None:
    """Show held-out results of two evaluations, and the paired changes that are in the later one.

    A change for the better or worse is coloured where it exceeds two standard errors.
    """
    # As narrow as it can be: four columns of numbers with errors just fit 80.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("held-out prompts")
    for heading in (*columns, "change \N{PLUS-MINUS SIGN} s.e."):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in names:
        metric, error, change = lookup(name), stderr_name(name), change_name(name)
        values = [metric.with_error(m.get(name), m.get(error)) for m in (before, after)]
        moved = clear_change(
            after.get(change), after.get(stderr_name(change)), metric.higher_is_better
        )
        colour = {"good": "green", "bad": "red", None: ""}[moved]
        table.add_row(metric.title, *values, Text(_change(name, after) or "-", colour))
    (console or Console()).print(table)
