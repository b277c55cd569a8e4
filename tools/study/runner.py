"""Runs the jobs of a study, a few at a time; what is finished is left, what was stopped resumes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grid import Grid, Step

from marlhf_mega.config.exit_codes import EXIT_PREEMPTED
from marlhf_mega.config.load import ConfigError

POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a job."""

    name: str
    job: str
    config: Path | None
    overrides: tuple[str, ...]
    target: Path
    """Its run directory; the log and a note that it is done stand beside it."""
    previous: Path | None = None
    """The run directory that it reads, of the arm's job before it."""

    @property
    def is_ready(self) -> bool:
        """Whether the job before it, if there is one, is done."""
        return self.previous is None or done_note(self.previous).is_file()

    @property
    def log(self) -> Path:
        """What it prints."""
        return self.target.with_name(f"{self.target.name}.log")

    @property
    def is_done(self) -> bool:
        """Whether exactly this has been run to its end."""
        note = done_note(self.target)
        return note.is_file() and note.read_text(encoding="utf-8") == self._described

    def note_done(self) -> None:
        """Note that it has been run to its end."""
        done_note(self.target).write_text(self._described, encoding="utf-8")

    @property
    def _described(self) -> str:
        return "\n".join([*self.command()[3:], ""])

    def command(self) -> list[str]:
        """Return what starts it."""
        given = [] if self.config is None else ["--config", str(self.config)]
        return [sys.executable, "-m", "marlhf_mega", self.job, *given, *self.overrides]


def done_note(target: Path) -> Path:
    """Return where the end of a run is noted."""
    return target.with_name(f"{target.name}.done")


def shared_runs(grid: Grid, folder: Path) -> list[Run]:
    """Return the jobs that all arms share, in their order."""
    return [_run(step, folder, folder / name, name=name) for name, step in grid.prepare.items()]


def arm_runs(
    grid: Grid, folder: Path, *, arms: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[list[Run]]:
    """Return the runs of all or some arms: the first job of each, then the second ones, ...

    They go seed by seed, so that what is there is comparable.
    """
    for kind, asked, known in (("arms", arms, grid.arms), ("seeds", seeds, grid.seeds)):
        for item in asked:
            if item not in known:
                raise ConfigError(
                    f"--{kind} {item}: must be in the grid, which has "
                    f"{', '.join(map(str, known))}. Choose among them."
                )
    chains = [_chain(grid, folder, a, s) for s in seeds or grid.seeds for a in arms or grid.arms]
    deepest = max(map(len, chains))
    return [[chain[i] for chain in chains if i < len(chain)] for i in range(deepest)]


def run_dir(folder: Path, arm: str, seed: int) -> Path:
    """Return the run directory of an arm and a seed: of its last job."""
    return folder / arm / f"seed-{seed}"


def _chain(grid: Grid, folder: Path, arm: str, seed: int) -> list[Run]:
    """Return the jobs of an arm and a seed, each of which may read what the one before has left."""
    jobs, last = grid.jobs_of(arm), run_dir(folder, arm, seed)
    targets = [last.with_name(f"{last.name}.{i}") for i in range(1, len(jobs))] + [last]
    name = f"{arm} seed {seed}"
    return [
        _run(step, folder, target, name=name, previous=previous, more=(f"run.seed={seed}",))
        for step, target, previous in zip(jobs, targets, [None, *targets], strict=False)
    ]


def _run(
    step: Step,
    folder: Path,
    target: Path,
    *,
    name: str,
    previous: Path | None = None,
    more: tuple[str, ...] = (),
) -> Run:
    def placed(text: str) -> str:
        if previous is not None:
            text = text.replace("previous:", f"{previous}/", 1)
        return text.replace("study:", f"{folder}/", 1)

    overrides = *step.overrides, *more, f"run.name={name}", f"run.dir={target}"
    return Run(
        name=name,
        job=step.job,
        config=None if step.config is None else Path(placed(str(step.config))),
        overrides=tuple(placed(item) for item in overrides),
        target=target,
        previous=previous,
    )


def run_all(runs: Sequence[Run], *, parallel: int) -> int:
    """Run what is not done, at most `parallel` at a time.

    Returns:
        0; 1 if a run failed, after all others; 75 if a signal stopped them.
    """
    left = [run for run in runs if not run.is_done]
    if len(left) < len(runs):
        print(f"{len(runs) - len(left)} of {len(runs)} runs are done", flush=True)
    threads = max(1, (os.cpu_count() or 1) // parallel)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    start, done, failed = time.monotonic(), 0, 0
    with _Stop() as stop:
        for run, code, seconds in _finished(left, parallel, environment, stop):
            done += 1
            if code == 0:
                run.note_done()
            failed += code not in (0, EXIT_PREEMPTED)
            result = "done" if code == 0 else f"exit code {code}, see {run.log}"
            time_left = (time.monotonic() - start) / done * (len(left) - done) / 60
            print(
                f"[{done}/{len(left)}] {run.name}: {result}, {seconds:.0f} s; "
                f"{time_left:.0f} min left",
                flush=True,
            )
    if stop.asked:
        print("stopped; the same command goes on", flush=True)
        return EXIT_PREEMPTED
    return int(failed > 0)


class _Stop:
    """Notes Ctrl-C and SIGTERM, which the jobs get from here."""

    asked = False

    def __enter__(self) -> "_Stop":
        kinds = (signal.SIGINT, signal.SIGTERM)
        self._before = {kind: signal.signal(kind, self._ask) for kind in kinds}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True


def _finished(
    runs: Sequence[Run], parallel: int, environment: dict[str, str], stop: _Stop
) -> Iterator[tuple[Run, int, float]]:
    """Start the runs and yield each with its exit code and seconds when it ends."""
    waiting = list(runs)
    alive: list[tuple[Run, subprocess.Popen[bytes], float]] = []
    told = False
    while alive or (waiting and not stop.asked):
        if stop.asked and not told:  # they save at the end of their step
            told = True
            for _, process, _ in alive:
                process.terminate()
        while waiting and len(alive) < parallel and not stop.asked:
            alive.append(_start(waiting.pop(0), environment))
        for entry in list(alive):
            run, process, since = entry
            code = process.poll()
            if code is not None:
                alive.remove(entry)
                yield run, code, time.monotonic() - since
        time.sleep(POLL_SECONDS)


def _start(run: Run, environment: dict[str, str]) -> tuple[Run, "subprocess.Popen[bytes]", float]:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    done_note(run.target).unlink(missing_ok=True)
    with run.log.open("ab") as log:
        process = subprocess.Popen(  # a session of its own: Ctrl-C reaches it once, from here
            run.command(), stdout=log, stderr=log, env=environment, start_new_session=True
        )
    return run, process, time.monotonic()
