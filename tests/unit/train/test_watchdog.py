"""Who is named when a run hangs; the hanging itself is in tests/e2e/test_injected_faults.py."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from marlhf_mega.config.schema import WatchdogConfig
from marlhf_mega.train.beats import WAITING, Answer, Note, describe, this_host

LIMITS = WatchdogConfig(seconds=60, update_seconds=5)
STACKS = Path("stacks")
HERE = Answer(
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
NOTE = Note(session="s", rank=1, pid=os.getpid(), host=this_host(), count=7, step=3, phase="update")


def test_a_phase_without_a_limit_of_its_own_has_the_common_one():
    assert LIMITS.limit_of("update") == ("watchdog.update_seconds", 5)
    assert LIMITS.limit_of("rollout") == ("watchdog.seconds", 60)
    assert LIMITS.limit_of("between phases") == ("watchdog.seconds", 60)


def test_collectives_wait_longer_than_the_longest_phase():
    assert LIMITS.collective_seconds == 1860
    assert WatchdogConfig(seconds=None, rollout_seconds=7200).collective_seconds == 7260


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
def test_the_rank_is_named_that_the_others_wait_for(answers, named):
    line = describe(answers, [], LIMITS, STACKS)
    assert [rank for rank in (0, 1) if f"rank {rank} has been in step 3" in line] == named


def test_the_line_names_key_phase_time_place_and_stacks():
    busy = replace(HERE, rank=2, waits=False)
    assert describe([HERE, busy], [], LIMITS, STACKS) == (
        "watchdog.update_seconds=5.0: no phase may take longer; rank 2 has been in step 3, update, "
        "for 5.5 s at ppo.py:1 in f. All ranks end with code 70, their stacks are in stacks. Start "
        "again, or raise the limit if the work takes that long."
    )


def test_a_rank_that_does_not_answer_is_named_before_all_others():
    line = describe([replace(HERE, waits=False)], [NOTE], LIMITS, STACKS)
    assert "rank 1 was last seen in step 3, update; no answer: stopped, or the machine is" in line
    assert "rank 0" not in line


def test_of_many_ranks_a_few_are_named():
    line = describe([HERE], [replace(NOTE, rank=rank) for rank in range(900)], LIMITS, STACKS)
    assert "; rank 4 was last seen in step 3, update; and 896 more. " in line


def test_a_rank_that_is_gone_is_told_from_one_that_hangs(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone = replace(NOTE, pid=ended.pid)
    assert gone.is_gone()
    assert not NOTE.is_gone()
    assert not replace(gone, state="ended").is_gone()
    assert not replace(gone, host="another").is_gone()
    for lost in (gone, replace(NOTE, state="failed")):
        line = describe([HERE], [lost], LIMITS, STACKS)
        assert line.startswith("run: no rank may end before the others; rank 1 has gone in step 3")


def test_a_note_is_read_in_its_session_only(tmp_path):
    path = tmp_path / "rank_00001"
    assert Note.read(path, "s") is None
    replace(NOTE, phase="a long name of a phase").write(path)
    NOTE.write(path)
    assert Note.read(path, "s") == NOTE
    assert Note.read(path, "earlier") is None
    path.write_text('{"session"')
    assert Note.read(path, "s") is None


def test_only_a_rank_of_the_same_launcher_is_killed():
    sibling_of_nobody = subprocess.Popen(["sleep", "60"])
    replace(NOTE, pid=sibling_of_nobody.pid).kill()
    assert sibling_of_nobody.poll() is None
    sibling_of_nobody.kill()
    sibling_of_nobody.wait()
