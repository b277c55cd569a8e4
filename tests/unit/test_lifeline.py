"""Processes that must not outlive their parent; real launchers are in launch/test_torchrun.py."""

import os
import subprocess
import sys


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", f"from marlhf_mega.lifeline import *\n{code}"],
        env=os.environ | environment,
        timeout=60,
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
