"""Hang and failure detection: every phase of a step has a deadline.

Every rank writes its step and phase to `run.dir`/heartbeats. A thread on each rank, which keeps
running if the main thread hangs, watches its own main thread and the next rank's heartbeat. The
first that sees a missed deadline, or that the next rank's process has died, raises the alarm by
creating the folder `run.dir`/stacks/SESSION. Every rank that can then writes its stacks there and
ends. One of them names the rank that blocked the run.
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
from types import FrameType
from typing import NoReturn, Self

from marlhf_mega import durable
from marlhf_mega.config.exit_codes import EXIT_FAILED, EXIT_HUNG, code_for_launcher
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.run import START
from marlhf_mega.parallel import launch
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.platform.cpu import collectives
from marlhf_mega.resilience.heartbeat import (
    LEASE_SECONDS,
    WAITING,
    AlarmReport,
    Heartbeat,
    name_culprits,
    take_lease,
    this_host,
)
from marlhf_mega.resilience.preemption import EarlyEndError

logger = logging.getLogger(__name__)

BETWEEN = "between phases"
POLL_SECONDS = 1.0
SAMPLE_SECONDS = 0.05
"""Interval at which to check whether the main thread waits for other ranks."""
ANSWER_SECONDS = 3.0
"""Time to write stacks after the alarm; a rank that takes longer counts as silent."""
FAILED_SECONDS = 10.0
"""Time for the other ranks to fail as well, once one has failed."""

_WAITING_FILES = (
    launch.__file__,
    collectives.__file__,
    "distributed_c10d.py",
    "p2p_communication.py",
    "param_and_grad_buffer.py",
)
"""Files in which the main thread is while it waits for other ranks."""


class Watchdog:
    """Watches this rank and the next one. All ranks create one and enter the same phases."""

    def __init__(self, config: Config, mesh: Mesh, *, step: int = 0) -> None:
        """Agree on a session name for this start of the run.

        Args:
            config: its `watchdog` section has the deadlines.
            mesh: this rank's mesh.
            step: the last finished step.
        """
        self.step = step
        self._limits, self._run_dir, self._mesh = config.watchdog, config.run.dir, mesh
        session = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self._session = mesh.launch.broadcast(session, source=0)
        self._host = this_host()
        self._stacks = self._run_dir / "stacks" / self._session
        self._ended, self._alarm = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True)
            for work in (self._watch, self._look_at_others)
        ]
        self._count, self._warned = 0, False
        self._waited: defaultdict[str, float] = defaultdict(float)

    def __enter__(self) -> Self:
        self._heartbeat_path(0).parent.mkdir(parents=True, exist_ok=True)
        self._take_lease()
        self.enter(START)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and _is_broken_connection(error):
            self._end_with_a_lost_rank()
        self._ended.set()
        fine = error is None or isinstance(error, EarlyEndError)
        reason = "" if fine else f"{type(error).__name__}: {error}".partition("\n")[0]
        self._put(replace(self._heartbeat, state="ended" if fine else "failed", reason=reason))

    def _end_with_a_lost_rank(self) -> None:
        """End this process with a report on the rank whose end has broken a connection.

        Returns if no rank turns out to be lost: then the connection itself has failed.
        """
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline:
            if self._stacks.is_dir() or any(h.is_lost() for h in self._others()):
                self._alarm.set()
                self._threads[0].join()  # it ends the process
            time.sleep(SAMPLE_SECONDS)

    def enter(self, phase: str | None, *, times: int = 1) -> None:
        """Record that the main thread enters a phase of `step`.

        Args:
            phase: None means between phases.
            times: how many times the limit of the phase it may take.
        """
        self._count += 1
        self._since = time.monotonic()
        self._put(self._heartbeat_of(phase or BETWEEN, times))

    def drain_waited(self) -> dict[str, float]:
        """Return and reset the seconds of each phase that were spent waiting for other ranks.

        They are measured by sampling the main thread. On GPUs the device waits instead, which is
        not visible here.
        """
        waited, self._waited = self._waited, defaultdict(float)
        return dict(waited)

    def _heartbeat_of(self, phase: str, times: int = 1) -> Heartbeat:
        return Heartbeat(
            session=self._session,
            rank=self._mesh.launch.rank,
            pid=os.getpid(),
            host=self._host,
            count=self._count,
            step=self.step,
            phase=phase,
            times=times,
        )

    def _put(self, heartbeat: Heartbeat) -> None:
        """Write it as well as the disk allows: this thread and its deadline do without."""
        self._heartbeat = heartbeat
        path = self._heartbeat_path(heartbeat.rank)
        try:
            # Not created again: that would keep a folder from being removed.
            heartbeat.write(path, create=heartbeat.count == 1)
        except FileNotFoundError:
            self._end_removed()
        except OSError as error:
            if not self._warned:
                logger.warning("%s: cannot be written; %s", path, error.strerror)
            self._warned = True

    def _end_removed(self) -> NoReturn:
        """End the process, not to be restarted, because somebody has removed the run directory."""
        if self._mesh.launch.rank == 0:
            logger.error(
                "run.dir=%s: must stay as long as the run writes to it; it was removed. The run "
                "ends. Start it again to begin afresh.",
                self._run_dir,
            )
        os._exit(code_for_launcher(EXIT_FAILED))

    def _take_lease(self) -> None:
        """Write the first heartbeat, and refuse a run directory that another launch uses.

        Raises:
            ConfigError: with host and process id; the same on all ranks.
        """
        ranks = self._mesh.launch
        holder = None
        if ranks.rank == 0:
            path = self._heartbeat_path(0)
            try:
                holder = take_lease(path, self._heartbeat_of(START))
            except OSError as error:  # a full disk: see `_put`
                logger.warning("%s: cannot be written; %s", path, error.strerror)
                self._warned = True
        holder = ranks.broadcast((holder,), source=0)[0]
        if holder is not None:
            raise ConfigError(
                f"run.dir={self._run_dir}: must not be in use; process {holder.pid} on host "
                f"{holder.host.split()[0]} writes to it. Use another run.dir, or end that run "
                f"first; {LEASE_SECONDS:g} s after its last sign of life the folder is free."
            )

    def _heartbeat_path(self, rank: int) -> Path:
        return self._run_dir / "heartbeats" / f"rank_{rank:05d}"

    def _stack_path(self, rank: int) -> Path:
        return self._stacks / f"rank_{rank:05d}.txt"

    def _watch(self) -> None:
        """Sample the main thread until the run ends or hangs; never wait for a file system."""
        sampled = time.monotonic()
        while not self._ended.wait(SAMPLE_SECONDS):
            now = time.monotonic()
            if _waits(_main_frame()):
                self._waited[self._heartbeat.phase] += now - sampled
            sampled = now
            if self._alarm.is_set() or self._is_late(self._heartbeat, now - self._since):
                self._end_run()

    def _look_at_others(self) -> None:
        """Refresh the lease on the run directory; look for an alarm and at the next rank."""
        seen, since = None, time.monotonic()
        while not self._ended.wait(POLL_SECONDS):
            now = time.monotonic()
            try:
                if self._mesh.launch.rank == 0:
                    os.utime(self._heartbeat_path(0))
                heartbeat, alarm = self._next_heartbeat(), self._stacks.is_dir()
                gone = heartbeat is not None and heartbeat.is_gone()
            except OSError:  # a disk that fails names no rank
                continue
            if heartbeat != seen:
                seen, since = heartbeat, now
            if alarm or gone or (heartbeat and self._is_late(heartbeat, now - since)):
                self._alarm.set()

    def _next_heartbeat(self) -> Heartbeat | None:
        """Return the next rank's heartbeat; None on a single rank or before its first one."""
        ranks = self._mesh.launch
        rank = (ranks.rank + 1) % ranks.size
        if rank == ranks.rank:
            return None
        return Heartbeat.read(self._heartbeat_path(rank), self._session)

    def _is_late(self, heartbeat: Heartbeat, seconds: float) -> bool:
        limit = None if heartbeat.phase == WAITING else self._limits.limit_of(heartbeat.phase)[1]
        if heartbeat.state != "running":
            limit = FAILED_SECONDS if heartbeat.state == "failed" else None
        return limit is not None and seconds > limit * heartbeat.times

    def _end_run(self) -> NoReturn:
        """End this process, after a report that a failing disk may cut short."""
        report = threading.Thread(target=self._report, name="watchdog report", daemon=True)
        report.start()
        report.join(3 * ANSWER_SECONDS)
        if sys.stderr.isatty():
            os.write(2, b"\r\033[K")  # what the launcher says next is not glued to a progress bar
        os._exit(EXIT_HUNG)

    def _report(self) -> None:
        """Write stacks, and name the blocking rank if this rank raised the alarm."""
        try:
            self._write_report()
        except (OSError, ValueError) as error:
            phase = self._heartbeat.phase
            key, limit = self._limits.limit_of(phase)
            logger.error(
                "%s=%s: rank %d ends in step %d, %s; no report can be written: %s",
                key,
                limit,
                self._heartbeat.rank,
                self._heartbeat.step,
                phase,
                error,
            )

    def _write_report(self) -> None:
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
            answers = [AlarmReport.read(path) for path in sorted(self._stacks.glob("rank_*.txt"))]
            line = name_culprits(answers, self._silent(), self._limits, self._stacks)
            logger.error("%s", line)
            durable.replace(summary, line + "\n", flush=False)
        while not summary.is_file() and time.monotonic() < deadline + ANSWER_SECONDS:
            time.sleep(POLL_SECONDS / 5)
        for heartbeat in self._silent():
            heartbeat.kill()  # torchrun would wait half a minute for a stopped process

    def _write_stacks(self) -> None:
        frame = _main_frame()
        file = Path(frame.f_code.co_filename)
        answer = AlarmReport(
            rank=self._heartbeat.rank,
            trains=not self._mesh.only_generates,
            count=self._heartbeat.count,
            step=self._heartbeat.step,
            phase=self._heartbeat.phase,
            seconds=round(time.monotonic() - self._since, 1),
            where=f"{'/'.join(file.parts[-2:])}:{frame.f_lineno} in {frame.f_code.co_name}",
            waits=_waits(frame),
        )
        # A disk that is busy with a checkpoint must not hold up the answer: not flushed.
        target = durable.replacing(self._stack_path(self._heartbeat.rank), flush=False)
        with target as partial, partial.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(answer)) + "\n\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)

    def _others(self) -> list[Heartbeat]:
        """Return the heartbeats of all other ranks."""
        ranks = self._mesh.launch
        others = [rank for rank in range(ranks.size) if rank != ranks.rank]
        found = [Heartbeat.read(self._heartbeat_path(rank), self._session) for rank in others]
        return [heartbeat for heartbeat in found if heartbeat is not None]

    def _silent(self) -> list[Heartbeat]:
        """Return the heartbeats of the ranks that should have answered and have not."""
        return [
            heartbeat
            for heartbeat in self._others()
            if heartbeat.state != "ended" and not self._stack_path(heartbeat.rank).is_file()
        ]


def _main_frame() -> FrameType:
    return sys._current_frames()[threading.main_thread().ident or 0]


def _is_broken_connection(error: BaseException) -> bool:
    """Whether an error was raised where ranks wait for each other."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and _waits(traceback.tb_frame)


def _waits(frame: FrameType) -> bool:
    return frame.f_code.co_filename.endswith(_WAITING_FILES)
