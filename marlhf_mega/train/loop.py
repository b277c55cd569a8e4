"""What is around the steps of every training job: evaluations, checkpoints, ends, the export."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from marlhf_mega.checkpoint.folders import path_of
from marlhf_mega.checkpoint.saver import Saver
from marlhf_mega.config.schema import Config
from marlhf_mega.metrics.jsonl import read_lines
from marlhf_mega.parallel.collectives import broadcast_object
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.preemption import StopRequest, count_attempt
from marlhf_mega.train.best import Best
from marlhf_mega.train.output import RunOutput
from marlhf_mega.train.resume import is_due

logger = logging.getLogger(__name__)


class TrainingRun(Protocol):
    """A job that trains, built and, where there is a checkpoint, resumed. All ranks call it."""

    config: Config
    mesh: Mesh
    output: RunOutput
    saver: Saver
    first_step: int
    """Steps done before; 0 for a fresh start."""
    num_steps: int

    def evaluate(self) -> dict[str, float]:
        """Return held-out results; nothing without held-out data."""

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` steps."""

    def load(self, folder: Path) -> None:
        """Take the trained models from a checkpoint of this run."""

    def export(self) -> None:
        """Write the trained models as Hugging Face folders."""


class Loop:
    """What every training job does around its steps. All ranks call it, inside of `run.output`."""

    def __init__(self, run: TrainingRun) -> None:
        """Count this start of the run.

        Raises:
            EarlyEndError: it has been asked to stop already, or started too often.
        """
        self.run, self.config = run, run.config
        count_attempt(self.config, run.first_step, run.mesh)
        self.request = StopRequest(self.config, run.mesh)
        if 0 < run.first_step < run.num_steps and self.request.is_made():
            raise self.request.end(run.first_step)
        self.best = self._best_so_far()
        self.done = run.first_step

    def start(self) -> dict[str, float]:
        """Return the held-out results from before training; nothing after a resume."""
        if self.run.first_step:
            return {}
        results = self.run.evaluate()
        self.run.output.write_start(results)
        return results

    def steps(self) -> Iterator[int]:
        """Yield the number of steps done before each step that is to be taken."""
        while self.done < self.run.num_steps and not self._has_lost_patience():
            yield self.done

    def finish_step(self, done: int, metrics: dict[str, float]) -> None:
        """Evaluate and save where it is due, and write the metrics of step number `done`.

        Raises:
            EarlyEndError: the run was asked to stop and has saved.
        """
        run, num_steps, is_best = self.run, self.run.num_steps, False
        self.done = done
        if is_due(done, self.config.evaluate.interval, num_steps):
            results = run.evaluate()
            metrics |= results
            if self.best is not None:
                is_best = self.best.update(done, broadcast_object(results))
        run.output.finish_step(done, metrics)
        is_last = done == num_steps or self._has_lost_patience()
        stopping = self.request.is_made() and not is_last
        with run.output.timers("checkpoint"):
            run.saver.poll()
            if (
                stopping
                or is_last
                or is_best
                or is_due(done, self.config.checkpoint.interval, num_steps)
            ):
                run.save(done)
            if is_best:
                run.saver.best = done
            if stopping or is_last:
                run.saver.finish()
        if stopping:
            raise self.request.end(done)

    def finish(self) -> None:
        """Export the models, those of the best checkpoint if it is kept, and write the report."""
        if self.config.checkpoint.export_hf:
            best = None if self.best is None else self.best.step
            with self.run.output.timers("export"):
                if best is not None and best != self.done:
                    logger.info("exporting the best checkpoint, that after step %d", best)
                    self.run.load(path_of(self.config.run.dir / "checkpoints", best))
                self.run.export()
        self.run.output.finish_run()

    def _best_so_far(self) -> Best | None:
        metric = self.config.checkpoint.keep_best
        if metric is None:
            return None
        lines = read_lines(self.config.run.dir / "metrics.jsonl")
        best: Best = broadcast_object(Best.of_run(metric, lines, first_step=self.run.first_step))
        self.run.saver.best = best.step
        return best

    def _has_lost_patience(self) -> bool:
        patience = self.config.evaluate.patience
        return patience is not None and self.best is not None and self.best.num_worse >= patience
