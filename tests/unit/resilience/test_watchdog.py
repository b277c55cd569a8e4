"""A watchdog ends its process whatever the disk does; whom it names is in test_heartbeat.py."""

import os
import subprocess
import sys
import time

import pytest

HANGS = """
import shutil, sys, time
from pathlib import Path
from marlhf_mega.config.schema import Config
from marlhf_mega.parallel.mesh import create_mesh
from marlhf_mega.resilience import watchdog
from marlhf_mega.resilience.watchdog import Watchdog

run_dir = Path(sys.argv[1])
config = Config.model_validate({"run": {"dir": run_dir}, "watchdog": {"seconds": 0.5}})
with Watchdog(config, create_mesh(config.parallel)) as dog:
    {fault}
    time.sleep(60)
"""
FAULTS = {
    "none": "",
    "run.dir is gone": "shutil.rmtree(run_dir)",
    "no folder can be made": "(run_dir / 'stacks').touch()",
    "the disk does not answer": "dog._write_stacks = lambda: time.sleep(60); "
    "watchdog.ANSWER_SECONDS = 0.5",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hang_is_ended_whatever_the_disk_does(tmp_path, fault):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS.replace("{fault}", FAULTS[fault]), str(tmp_path / "run")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 70, done.stderr
    assert time.monotonic() - started < 55
    if fault != "the disk does not answer":
        assert "watchdog.seconds=0.5: " in done.stderr
    if fault == "none":
        assert "rank 0 has been in step 0, start-up, for " in done.stderr
