"""launch/quickstart.sh with an environment that only records how it was called."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def quickstart(tmp_path):
    """Run the script in a project whose .venv is up to date and whose Python is a stand-in."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    pins = {"pyproject.toml": b"a", ".ci/constraints.txt": b"b"}
    (tmp_path / ".ci").mkdir()
    for name, content in pins.items():
        (tmp_path / name).write_bytes(content)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    stamp = hashlib.sha256(b"".join(pins.values())).hexdigest()
    (tmp_path / ".venv" / "installed.sha256").write_text(f"{stamp}  -\n")

    def run(body, *arguments):
        python.write_text(f"#!/usr/bin/env bash\n[[ $1 != -c ]] || exit 0\n{body}\n")
        python.chmod(0o755)
        return subprocess.run(
            ["bash", tmp_path / "launch" / "quickstart.sh", *arguments],
            env={"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return run


def test_a_wrong_key_is_one_line_and_exit_code_2(quickstart):
    done = quickstart('echo "world of $WORLD_SIZE: $*" >&2; exit 2', "ppo.epoch=2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "world of 4: -m marlhf_mega quickstart ppo.epoch=2 --check\n"


def test_what_is_right_is_started_on_four_ranks(quickstart):
    done = quickstart('echo "$OMP_NUM_THREADS: $*"', "run.dir=a b")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "1: -m marlhf_mega quickstart run.dir=a b --check\n"
        "1: -m torch.distributed.run --standalone --nproc-per-node 4 "
        "-m marlhf_mega quickstart run.dir=a b\n"
    )


def test_a_quickstart_that_is_complete_is_not_started(quickstart):
    done = quickstart('echo "already complete: $#"')
    assert (done.returncode, done.stdout, done.stderr) == (0, "already complete: 4\n", "")
