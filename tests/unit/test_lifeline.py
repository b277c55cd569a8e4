"""Processes that must not outlive their parent; real launchers are in launch/test_torchrun.py."""

import os
import subprocess
import sys
import time

from marlhf_mega.lifeline import seconds_since_launch


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", f"from marlhf_mega.lifeline import *\n{code}"],
        env=os.environ | environment,
        timeout=300,
        check=False,
    ).returncode


def test_a_parent_that_is_gone_already_is_noticed():
    assert run(f"die_with_parent({os.getpid()})") == 0
    assert run(f"die_with_parent({os.getppid()})") == 1


def test_a_rank_belongs_to_its_torchrun_and_other_processes_to_nobody():
    other = {"MARLHF_LAUNCHER_PID": str(os.getppid())}
    assert run("die_with_launcher()", TORCHELASTIC_RUN_ID="x", **other) == 1
    own = {"MARLHF_LAUNCHER_PID": str(os.getpid())}
    assert run("die_with_launcher()", TORCHELASTIC_RUN_ID="x", **own) == 0
    assert run("die_with_launcher()", **other) == 0


def test_the_age_of_a_launch_is_that_of_torchrun_and_else_that_of_the_process():
    code = "from marlhf_mega.lifeline import *; print(seconds_since_launch())"
    started = time.monotonic()

    def age(**environment):
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, check=True
        )
        return float(done.stdout)

    tick = 1 / os.sysconf("SC_CLK_TCK")  # Linux rounds the start of a process down to one
    assert 0 <= age() <= time.monotonic() - started + tick
    mine = seconds_since_launch()
    assert mine <= age(TORCHELASTIC_RUN_ID="x") <= mine + time.monotonic() - started
