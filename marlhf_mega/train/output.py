"""What a run writes: run directory, metrics, samples, progress, report."""

import json
import logging
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Self

from omegaconf import OmegaConf

from marlhf_mega import durable
from marlhf_mega.checkpoint import manifest
from marlhf_mega.checkpoint.hf.side_files import copy_side_files
from marlhf_mega.config.checks import TrainingJob
from marlhf_mega.config.schema import Config
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.metrics.jsonl import JsonLines
from marlhf_mega.metrics.macro_actions import describe_actions
from marlhf_mega.metrics.memory import PhasePeaks
from marlhf_mega.metrics.progress import Progress
from marlhf_mega.metrics.reduce import MetricSums, reduce_metrics
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.metrics.writers import Action, MetricsWriter, Sample, SamplesWriter
from marlhf_mega.models.spec import compute_dtype
from marlhf_mega.parallel.collectives import max_over_world, sum_over_world
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.report.page import report
from marlhf_mega.resilience.fault_injection import Faults
from marlhf_mega.resilience.stragglers import Stragglers
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.train.batch_table import batches, show_batches
from marlhf_mega.train.inputs import Inputs

logger = logging.getLogger(__name__)


class RunOutput:
    """Writers, timers and watchdog of one job. Every rank has one; rank 0 writes."""

    def __init__(
        self,
        job: TrainingJob,
        inputs: Inputs[Any],
        mesh: Mesh,
        watchdog: Watchdog,
        *,
        num_steps: int,
        first_step: int,
    ) -> None:
        self.mesh = mesh
        self.config = inputs.config
        self.timers = PhaseTimers(mesh.platform.synchronize, self._enter_phase)
        self.peaks = PhasePeaks(mesh.platform)
        self._num_steps = num_steps
        self._faults = Faults(mesh.launch.rank, self.config.run.dir)
        self._stragglers = Stragglers(mesh)
        self._watchdog = watchdog
        watchdog.step = first_step
        self._writer: MetricsWriter | None = None
        self._samples: SamplesWriter | None = None
        self._macro_actions: JsonLines | None = None
        self._progress: Progress | None = None
        self._open = ExitStack()
        mesh.platform.reset_memory_peak()
        if mesh.rank != 0:
            return
        config, run_dir = self.config, self.config.run.dir
        # Lines are numbered by the steps done: the line of the checkpoint's own step stays.
        first_line = first_step + 1 if first_step else 0
        write_run_directory(config, inputs.tokenizer, inputs.tokenizer_path, mesh)
        self._writer = MetricsWriter(
            run_dir,
            run_name=config.run.name,
            config=config.model_dump(mode="json"),
            first_step=first_line,
            tensorboard=config.logging.tensorboard,
            wandb_project=config.logging.wandb,
        )
        self._samples = SamplesWriter(run_dir, first_step=first_line)
        if job == "ppo":
            path = run_dir / "macro_actions.jsonl"
            self._macro_actions = JsonLines(path, first_step=first_line)
        self._progress = Progress(
            job,
            num_steps=num_steps,
            first_step=first_step,
            interval=config.logging.interval or (1 if job == "ppo" else 10),
        )
        logger.info("%s: %s, %d steps into %s", job, mesh.describe(), num_steps, run_dir)
        show_batches(batches(config, job, mesh))

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Time a step and tell the watchdog its number in metrics.jsonl."""
        self._watchdog.step = number
        with self.timers("step"):
            yield

    def _enter_phase(self, phase: str | None) -> None:
        self._watchdog.enter(phase)
        if self._progress is not None:
            self._progress.enter(phase)
        if phase is not None:
            self._faults.enter(self._watchdog.step, phase)

    def reduce(self, sums: MetricSums) -> dict[str, float]:
        """Reduce the metrics over all ranks. All ranks call it and get the values."""
        device = self.mesh.device
        return reduce_metrics(sums, sum_over_world, max_over_world, device=device)

    def finish_step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Write and show a step, held-out results after it, and its times; rank 0 writes.

        All ranks call it: one small collective compares their own work in each phase.
        """
        times, waited = self.timers.drain(), self._watchdog.drain_waited()
        times |= self._stragglers.report(times, waited, step=done)
        if self._writer is None or self._progress is None:
            return
        peak = self.peaks.highest_gib()
        everything = {**metrics, **times, "perf/peak_memory_gib": peak}
        self._writer.write(done, everything)
        self._progress.update(done, everything)

    def write_start(self, results: Mapping[str, float]) -> None:
        """Write and show held-out results from before training, if there are any; rank 0 writes."""
        times = self.timers.drain()
        if results and self._writer is not None and self._progress is not None:
            self._writer.write(0, {**results, **times})
            self._progress.show_results(0, results)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write samples; rank 0 writes."""
        if self._samples is not None and self._writer is not None:
            self._samples.write(step, samples)
            self._writer.write_texts(step, samples)

    def write_macro_actions(self, step: int, responses: Sequence[Sequence[Action]]) -> None:
        """Write what the macro actions of these responses are like; rank 0 writes."""
        if self._macro_actions is not None:
            self._macro_actions.write({"step": step, **describe_actions(responses)})

    def finish_run(self) -> None:
        """Add the times after the last step to its line, and write report.html; rank 0 writes."""
        times = self.timers.drain()
        if self._writer is not None:
            self._writer.add(self._num_steps, times)
            report([self.config.run.dir], self.config.run.dir / "report.html")

    def __enter__(self) -> Self:
        self._watchdog.enter(None)
        for writer in (self._macro_actions, self._samples, self._writer):
            if writer is not None:
                self._open.enter_context(closing(writer))
        if self._progress is not None:
            self._open.enter_context(self._progress)
        return self

    def __exit__(self, *details: Any) -> None:
        self._open.__exit__(*details)


def write_run_directory(
    config: Config, tokenizer: Tokenizer, tokenizer_path: Path, mesh: Mesh
) -> None:
    """Write config.yaml, with the versions and the layout of this run, and the tokenizer."""
    run_dir = config.run.dir
    run_dir.mkdir(parents=True, exist_ok=True)
    facts = {
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "prompt_fingerprint": tokenizer.prompt_fingerprint(),
        "layout": mesh.describe(),
        "dtype": str(compute_dtype(config.precision, mesh)).removeprefix("torch."),
        "versions": manifest.versions(),
        "git_revision": _git_revision(),
    }
    tree = OmegaConf.create(config.model_dump(mode="json") | facts)
    # A resume reads it: a start that is killed here must leave one that is whole.
    durable.replace(run_dir / "config.yaml", OmegaConf.to_yaml(tree))
    _copy_tokenizer(tokenizer, tokenizer_path, run_dir / "tokenizer")


def _copy_tokenizer(tokenizer: Tokenizer, source: Path, target: Path) -> None:
    """Replace a run's tokenizer by another, unless it is the same one."""
    if target.resolve() in (source.resolve(), source.resolve().parent):
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    if source.is_dir():
        copy_side_files(source, target)
    # Jobs that begin from this run end responses where it did.
    generation = target / "generation_config.json"
    kept = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    generation.write_text(json.dumps(kept | {"eos_token_id": list(tokenizer.end_ids)}) + "\n")
    if source.is_file():
        shutil.copyfile(source, target / "tokenizer.model")
        # A SentencePiece file does not say whether texts begin with a special token.
        settings = {"add_bos_token": bool(tokenizer.prompt_prefix)}
        (target / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def _git_revision() -> str | None:
    """Return the revision of the source tree, None without a git checkout."""
    try:
        found = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
