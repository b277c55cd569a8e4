"""A deadline for every phase of a step: a run that hangs says where, and ends at once.

Every rank notes its step and phase in `run.dir`/beats. A thread on each rank, which a hanging main
thread does not hold up, looks at its own main thread and at the next rank's note. The first to see
a deadline passed, or the next rank's process gone, creates the folder `run.dir`/stacks/SESSION:
that is the alarm. Every rank that can writes its stacks there and ends; one names the culprit.
"""

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from marlhf_mega.config.exit_codes import EXIT_HUNG
from marlhf_mega.config.schema import Config
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.train.beats import WAITING, Answer, Note, describe, this_host
from marlhf_mega.train.stop import EarlyEndError

logger = logging.getLogger(__name__)

BETWEEN = "between phases"
POLL_SECONDS = 1.0
SAMPLE_SECONDS = 0.05
"""Between two looks at whether the main thread waits for other ranks."""
ANSWER_SECONDS = 3.0
"""Time to write stacks after the alarm; a rank that takes longer does not answer."""
FAILED_SECONDS = 10.0
"""Time that the others get to fail as well, once a rank has."""

_WAITING_FILES = (
    "distributed_c10d.py",
    "parallel/launch.py",
    "platform/cpu_collectives.py",
    "p2p_communication.py",
    "param_and_grad_buffer.py",
)
"""Where the main thread stands while it waits for other ranks."""


class Watchdog:
    """Watches this rank and the next one. All ranks create it and enter the same phases."""

    def __init__(self, config: Config, mesh: Mesh, *, step: int = 0) -> None:
        """Agree on a name for this start of the run.

        Args:
            config: its `watchdog` section has the deadlines.
            mesh: where this rank stands.
            step: the last that is done.
        """
        self.step = step
        self._limits, self._run_dir, self._mesh = config.watchdog, config.run.dir, mesh
        session = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self._session = mesh.launch.broadcast(session, source=0)
        self._host = this_host()
        self._stacks = self._run_dir / "stacks" / self._session
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._count = 0
        self._waited: defaultdict[str, float] = defaultdict(float)

    def __enter__(self) -> Self:
        self._note_path(0).parent.mkdir(parents=True, exist_ok=True)
        self.enter(None)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        fine = error is None or isinstance(error, EarlyEndError)
        self._put(replace(self._note, state="ended" if fine else "failed"))

    def enter(self, phase: str | None) -> None:
        """Note that the main thread enters a phase of `step`; none: it is between two."""
        self._count += 1
        self._since = time.monotonic()
        self._put(
            Note(
                session=self._session,
                rank=self._mesh.launch.rank,
                pid=os.getpid(),
                host=self._host,
                count=self._count,
                step=self.step,
                phase=phase or BETWEEN,
            )
        )

    def drain_waited(self) -> dict[str, float]:
        """Return the seconds of each phase spent waiting for other ranks; start from zero.

        They are found by looking at the main thread now and then. On GPUs it is the device that
        waits, which is not seen here.
        """
        waited, self._waited = self._waited, defaultdict(float)
        return dict(waited)

    def _put(self, note: Note) -> None:
        self._note = note
        note.write(self._note_path(note.rank))

    def _note_path(self, rank: int) -> Path:
        return self._run_dir / "beats" / f"rank_{rank:05d}"

    def _stack_path(self, rank: int) -> Path:
        return self._stacks / f"rank_{rank:05d}.txt"

    def _watch(self) -> None:
        """Poll until the run ends or hangs."""
        seen, since = None, time.monotonic()
        looked = sampled = since
        while not self._ended.wait(SAMPLE_SECONDS):
            now = time.monotonic()
            if _waits(_main_frame()):
                self._waited[self._note.phase] += now - sampled
            sampled = now
            if now - looked < POLL_SECONDS:
                continue
            note, looked = self._next_note(), now
            if note != seen:
                seen, since = note, now
            if (
                self._stacks.is_dir()
                or self._is_late(self._note, now - self._since)
                or (note is not None and (note.is_gone() or self._is_late(note, now - since)))
            ):
                self._end_run()

    def _next_note(self) -> Note | None:
        """Return the next rank's note; none of a rank alone, or before the note is there."""
        launch = self._mesh.launch
        rank = (launch.rank + 1) % launch.size
        if rank == launch.rank:
            return None
        return Note.read(self._note_path(rank), self._session)

    def _is_late(self, note: Note, seconds: float) -> bool:
        limit = None if note.phase == WAITING else self._limits.limit_of(note.phase)[1]
        if note.state != "running":
            limit = FAILED_SECONDS if note.state == "failed" else None
        return limit is not None and seconds > limit

    def _end_run(self) -> None:
        """Write stacks, name the culprit if this rank is the first here, end this process."""
        self._stacks.parent.mkdir(exist_ok=True)
        try:
            self._stacks.mkdir()
            first = True
        except FileExistsError:
            first = False
        self._write_stacks()
        summary = self._stacks / "summary.txt"
        deadline = time.monotonic() + ANSWER_SECONDS
        if first:
            while self._silent() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS / 5)
            answers = [Answer.read(path) for path in sorted(self._stacks.glob("rank_*.txt"))]
            line = describe(answers, self._silent(), self._limits, self._stacks)
            logger.error("%s", line)
            partial = summary.with_suffix(".tmp")
            partial.write_text(line + "\n", encoding="utf-8")
            partial.replace(summary)
        while not summary.is_file() and time.monotonic() < deadline + ANSWER_SECONDS:
            time.sleep(POLL_SECONDS / 5)
        for note in self._silent():
            note.kill()  # torchrun would give a stopped process half a minute to hear a signal
        os._exit(EXIT_HUNG)

    def _write_stacks(self) -> None:
        frame = _main_frame()
        file = Path(frame.f_code.co_filename)
        answer = Answer(
            rank=self._note.rank,
            trains=not self._mesh.only_generates,
            count=self._note.count,
            step=self._note.step,
            phase=self._note.phase,
            seconds=round(time.monotonic() - self._since, 1),
            where=f"{'/'.join(file.parts[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}",
            waits=_waits(frame),
        )
        target = self._stack_path(self._note.rank)
        partial = target.with_suffix(".tmp")
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(answer)) + "\n\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
        partial.replace(target)

    def _silent(self) -> list[Note]:
        """Return the notes of the ranks that should have answered and have not."""
        ranks = range(self._mesh.launch.size)
        missing = [rank for rank in ranks if not self._stack_path(rank).is_file()]
        notes = [Note.read(self._note_path(rank), self._session) for rank in missing]
        return [note for note in notes if note is not None and note.state != "ended"]


def _main_frame() -> FrameType:
    return sys._current_frames()[threading.main_thread().ident or 0]


def _waits(frame: FrameType) -> bool:
    return frame.f_code.co_filename.endswith(_WAITING_FILES)
