"""Who is named when a run hangs; the hanging itself is in tests/e2e/test_injected_faults.py."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from marlhf_mega.config.sections.run import WatchdogConfig
from marlhf_mega.resilience import heartbeat
from marlhf_mega.resilience.heartbeat import (
    WAITING,
    AlarmReport,
    Heartbeat,
    is_in_use,
    name_culprits,
    take_lease,
    this_host,
)

LIMITS = WatchdogConfig(seconds=60, update_seconds=5)
STACKS = Path("stacks")
HERE = AlarmReport(
    rank=0,
    trains=True,
    count=7,
    step=3,
    phase="update",
    seconds=5.5,
    where="ppo.py:1 in f",
    waits=True,
)
AWAY = replace(HERE, rank=1, trains=False, count=2)
HEARTBEAT = Heartbeat(
    session="s", rank=1, pid=os.getpid(), host=this_host(), count=7, step=3, phase="update"
)


@pytest.mark.parametrize(
    ("answers", "named"),
    [
        ([HERE, replace(HERE, rank=1, waits=False)], [1]),
        ([HERE, replace(HERE, rank=1, count=6, phase="experience")], [1]),
        ([replace(HERE, waits=False), replace(HERE, rank=1, count=6)], [1]),
        ([HERE, replace(HERE, rank=1)], [0, 1]),
        ([HERE, replace(AWAY, phase="rollout", waits=False)], [1]),
        ([HERE, replace(AWAY, phase=WAITING)], [0]),
    ],
    ids=[
        "does not wait",
        "is behind",
        "is behind though it waits",
        "all wait",
        "generates, in fewer phases",
        "waits to generate",
    ],
)
def test_the_rank_that_the_others_wait_for_is_named(answers, named):
    line = name_culprits(answers, [], LIMITS, STACKS)
    assert [rank for rank in (0, 1) if f"rank {rank} has been in step 3" in line] == named


def test_the_message_names_key_phase_time_place_and_stacks():
    busy = replace(HERE, rank=2, waits=False)
    assert name_culprits([HERE, busy], [], LIMITS, STACKS) == (
        "watchdog.update_seconds=5.0: no phase may take longer; rank 2 has been in step 3, update, "
        "for 5.5 s at ppo.py:1 in f. All ranks end with code 70, their stacks are in stacks. Restart "
        "the run, or raise the limit if the work takes that long."
    )


def test_a_rank_that_does_not_answer_is_named_before_all_others():
    line = name_culprits([replace(HERE, waits=False)], [HEARTBEAT], LIMITS, STACKS)
    assert "rank 1 was last seen in step 3, update; no answer: stopped, or the machine is" in line
    assert "rank 0" not in line


def test_only_a_few_of_many_ranks_are_named():
    line = name_culprits(
        [HERE], [replace(HEARTBEAT, rank=rank) for rank in range(900)], LIMITS, STACKS
    )
    assert "; rank 4 was last seen in step 3, update; and 896 more. " in line


def test_a_dead_rank_is_distinguished_from_a_hanging_one(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone = replace(HEARTBEAT, pid=ended.pid)
    assert gone.is_gone()
    assert not HEARTBEAT.is_gone()
    assert not replace(gone, state="ended").is_gone()
    assert not replace(gone, host="another").is_gone()
    failed = replace(HEARTBEAT, state="failed", reason="OSError: disk full")
    killed = f"process {ended.pid} was killed, for example because memory ran out"
    for lost, why in ((gone, killed), (failed, "OSError: disk full")):
        assert name_culprits([HERE], [lost], LIMITS, STACKS) == (
            "run: no rank may end before the others; rank 1 ended in step 3, update: "
            f"{why}. The others end with code 70, their stacks are in stacks. Restart the run."
        )


def test_a_rank_that_was_killed_is_gone_before_its_launcher_looks():
    killed = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert not replace(HEARTBEAT, pid=killed.pid).is_gone()
    killed.kill()
    deadline = time.monotonic() + 30
    while not replace(HEARTBEAT, pid=killed.pid).is_gone():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert killed.wait() < 0


def test_a_long_reason_fits_the_file(tmp_path):
    path = tmp_path / "rank_00001"
    reason = 'ValueError: "\N{SNOWMAN}"\n' + "x" * 1000
    replace(HEARTBEAT, state="failed", reason=reason).write(path)
    assert path.stat().st_size == 512
    assert Heartbeat.read(path, "s").reason.startswith("ValueError: '/u2603'/nxxx")
    HEARTBEAT.write(path)
    assert Heartbeat.read(path, "s") == HEARTBEAT


def test_a_heartbeat_is_read_in_its_session_only(tmp_path):
    path = tmp_path / "rank_00001"
    assert Heartbeat.read(path, "s") is None
    replace(HEARTBEAT, phase="a long name of a phase").write(path)
    HEARTBEAT.write(path)
    assert Heartbeat.read(path, "s") == HEARTBEAT
    assert Heartbeat.read(path, "earlier") is None
    path.write_text('{"session"')
    assert Heartbeat.read(path, "s") is None


def test_only_a_rank_of_the_same_launcher_is_killed():
    sibling_of_nobody = subprocess.Popen(["sleep", "60"])
    replace(HEARTBEAT, pid=sibling_of_nobody.pid).kill()
    assert sibling_of_nobody.poll() is None
    sibling_of_nobody.kill()
    sibling_of_nobody.wait()


@pytest.fixture
def elsewhere(tmp_path):
    """The heartbeat of a process whose machine is another one, so that nobody can look."""
    path = tmp_path / "rank_00000"
    replace(HEARTBEAT, host="another pid:[1]").write(path)
    return path


def test_a_folder_is_in_use_while_its_heartbeat_is_touched(elsewhere):
    def touch():
        while not ended.wait(0.05):
            elsewhere.touch()

    ended = threading.Event()
    thread = threading.Thread(target=touch)
    thread.start()
    try:
        holder = Heartbeat.read(elsewhere)
        assert take_lease(elsewhere, replace(HEARTBEAT, session="mine")) == holder
    finally:
        ended.set()
        thread.join()
    replace(HEARTBEAT, state="ended").write(elsewhere)
    mine = replace(HEARTBEAT, session="mine")
    assert take_lease(elsewhere, mine) is None
    assert Heartbeat.read(elsewhere) == mine
    assert list(elsewhere.parent.iterdir()) == [elsewhere]


def test_a_folder_is_free_some_time_after_the_last_touch(elsewhere, monkeypatch):
    monkeypatch.setattr(heartbeat, "LEASE_SECONDS", 1.0)
    started = time.monotonic()
    assert not is_in_use(elsewhere, Heartbeat.read(elsewhere))
    assert 0.5 < time.monotonic() - started < 10
    monkeypatch.setattr(heartbeat, "LEASE_SECONDS", 3600.0)
    long_ago = time.time() - 3700
    os.utime(elsewhere, (long_ago, long_ago))
    assert not is_in_use(elsewhere, Heartbeat.read(elsewhere))


def test_a_folder_is_free_at_once_if_its_process_is_gone(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path = tmp_path / "rank_00000"
    replace(HEARTBEAT, pid=ended.pid).write(path)
    started = time.monotonic()
    assert take_lease(path, HEARTBEAT) is None
    assert time.monotonic() - started < 5


def _start(path, barrier, results, over):
    own = replace(HEARTBEAT, session=f"of {os.getpid()}", pid=os.getpid())
    barrier.wait()
    holder = take_lease(path, own)
    results.put((own.session, holder and holder.session))
    while holder is None and not over.wait(0.02):
        path.touch()


@pytest.mark.parametrize("before", [None, replace(HEARTBEAT, state="ended")])
def test_of_starts_at_the_same_time_one_takes_the_folder(before, tmp_path):
    """Repeated, since each pair of processes meets at another moment."""
    context = multiprocessing.get_context("fork")
    for number in range(5):
        path = tmp_path / str(number) / "rank_00000"
        path.parent.mkdir()
        if before is not None:
            before.write(path)
        barrier, results, over = context.Barrier(3), context.Queue(), context.Event()
        arguments = (path, barrier, results, over)
        processes = [context.Process(target=_start, args=arguments) for _ in range(3)]
        for process in processes:
            process.start()
        found = dict(results.get(timeout=300) for _ in processes)
        over.set()
        for process in processes:
            process.join(60)
        (winner,) = (session for session, holder in found.items() if holder is None)
        assert {holder for holder in found.values() if holder} == {winner}
        assert Heartbeat.read(path).session == winner


def test_a_claim_of_a_process_that_died_at_once_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "LEASE_SECONDS", 0.3)
    path = tmp_path / "rank_00000"
    (tmp_path / "after_nothing.0").touch()
    assert take_lease(path, HEARTBEAT) is None
    assert list(tmp_path.iterdir()) == [path]
