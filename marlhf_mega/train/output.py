"""What a run writes: its directory, metrics per step, samples, progress on the terminal."""

import json
import logging
import platform as machine
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from omegaconf import OmegaConf

from marlhf_mega.config.schema import Config
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.metrics.memory import PhasePeaks
from marlhf_mega.metrics.progress import Job, Progress, batch_arithmetic, show_batch_arithmetic
from marlhf_mega.metrics.reduce import MetricSums, reduce_metrics
from marlhf_mega.metrics.report import report
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.metrics.writers import MetricsWriter, Sample, SamplesWriter
from marlhf_mega.parallel.collectives import max_over_world, sum_over_world
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.train.faults import Faults
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.stragglers import Stragglers
from marlhf_mega.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class RunOutput:
    """Writers, clocks and watchdog of one job. All ranks hold one; rank 0 writes."""

    def __init__(
        self, job: Job, inputs: Inputs[Any], mesh: Mesh, *, num_steps: int, first_step: int
    ) -> None:
        self.mesh = mesh
        self.config = inputs.config
        self.timers = PhaseTimers(mesh.platform.synchronize, self._enter_phase)
        self.peaks = PhasePeaks(mesh.platform)
        self._faults = Faults(mesh.launch.rank, self.config.run.dir)
        self._stragglers = Stragglers(mesh)
        self._watchdog = Watchdog(self.config, mesh, step=first_step)
        self._writer: MetricsWriter | None = None
        self._samples: SamplesWriter | None = None
        self._progress: Progress | None = None
        mesh.platform.reset_memory_peak()
        if mesh.rank != 0:
            return
        config, run_dir = self.config, self.config.run.dir
        # Lines are numbered by the steps done: those of the checkpoint's own step stay.
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
        self._progress = Progress(job, num_steps=num_steps, first_step=first_step)
        logger.info("%s: %s, %d steps into %s", job, mesh.describe(), num_steps, run_dir)
        show_batch_arithmetic(batch_arithmetic(config, job, data_size=mesh.dp_size))

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Time a step, and let the watchdog know it by its number in metrics.jsonl."""
        self._watchdog.step = number
        with self.timers("step"):
            yield

    def _enter_phase(self, phase: str | None) -> None:
        self._watchdog.enter(phase)
        if phase is not None:
            self._faults.enter(self._watchdog.step, phase)

    def reduce(self, sums: MetricSums) -> dict[str, float]:
        """Combine all ranks' metrics; every rank calls it and gets the values."""
        device = self.mesh.device
        return reduce_metrics(sums, sum_over_world, max_over_world, device=device)

    def finish_step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Write and show a step, with its times, under the number of steps done; rank 0 acts.

        All ranks call it and say how long they took, without waiting for each other.
        """
        times, waited = self.timers.drain(), self._watchdog.drain_waited()
        times |= self._stragglers.report(times, waited, step=done)
        if self._writer is None or self._progress is None:
            return
        peak = self.peaks.highest_gib()
        everything = {**metrics, **times, "perf/peak_memory_gib": peak}
        self._writer.write(done, everything)
        self._progress.update(done - 1, everything)

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write held-out results between steps, and the time they took; rank 0 acts."""
        times = self.timers.drain()
        if self._writer is not None:
            self._writer.write(step, {**metrics, **times})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in sorted(metrics.items()))
            logger.info("held-out at step %d: %s", step, shown)

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Write samples; rank 0 acts."""
        if self._samples is not None:
            self._samples.write(step, samples)

    def write_report(self, earlier: Sequence[Path] = ()) -> Path:
        """Write report.html about this run and those before it; rank 0 acts."""
        out = self.config.run.dir / "report.html"
        if self.mesh.rank == 0:
            report([*earlier, self.config.run.dir], out)
        return out

    def __enter__(self) -> Self:
        self._watchdog.__enter__()
        if self._progress is not None:
            self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, error, traceback)
        if self._writer is not None:
            self._writer.close()
        if self._samples is not None:
            self._samples.close()
        self._watchdog.__exit__(kind, error, traceback)


def write_run_directory(
    config: Config, tokenizer: Tokenizer, tokenizer_path: Path, mesh: Mesh
) -> None:
    """Write config.yaml, with what is known about this run beside the keys, and the tokenizer."""
    run_dir = config.run.dir
    run_dir.mkdir(parents=True, exist_ok=True)
    facts = {
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "layout": mesh.describe(),
        "versions": {
            "python": machine.python_version(),
            **{name: version(name) for name in ("marlhf-mega", "torch", "megatron-core")},
        },
        "git_revision": _git_revision(),
    }
    tree = OmegaConf.create(config.model_dump(mode="json") | facts)
    # A resume reads it: a start that is killed here must leave one that is whole.
    written = run_dir / "config.yaml.new"
    written.write_text(OmegaConf.to_yaml(tree), encoding="utf-8")
    written.replace(run_dir / "config.yaml")
    target = run_dir / "tokenizer"
    source = tokenizer_path.resolve()
    if target.resolve() in (source, source.parent):
        return
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:  # of a run that was here before
        (target / name).unlink(missing_ok=True)
    if tokenizer_path.is_file():
        shutil.copyfile(tokenizer_path, target / "tokenizer.model")
        # The file itself does not say whether texts begin with a token.
        says = {"add_bos_token": bool(tokenizer.prompt_prefix)}
        (target / "tokenizer_config.json").write_text(json.dumps(says) + "\n", encoding="utf-8")
        return
    for name in TOKENIZER_FILES:
        if (tokenizer_path / name).is_file():
            shutil.copyfile(tokenizer_path / name, target / name)


def _git_revision() -> str | None:
    """Return the revision of the source tree, none where there is no git checkout."""
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
