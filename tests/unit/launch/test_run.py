"""tests/run.sh: which parts it runs, with stand-ins for the environments."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
VENV = """
make_venv() { VENV_PYTHON=./plain; }
make_vllm_venv() { VENV_PYTHON=./vllm; }
"""
PYTHON = """#!/usr/bin/env bash
echo "$(basename "$0") $2" >>calls
[[ $2 != pytest || $(basename "$0") != "$FAILS" ]]
"""


@pytest.mark.parametrize(
    ("fails", "code", "calls"),
    [
        ("neither", 0, ["plain ruff", "plain pytest", "vllm pytest"]),
        # What has failed runs once more.
        ("plain", 1, ["plain ruff", "plain pytest", "plain pytest", "vllm pytest"]),
        ("vllm", 1, ["plain ruff", "plain pytest", "vllm pytest", "vllm pytest"]),
    ],
)
def test_with_vllm_both_suites_run_and_either_decides(tmp_path, fails, code, calls):
    (tmp_path / "tests").mkdir()
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "tests" / "run.sh", tmp_path / "tests")
    (tmp_path / "launch" / "venv.sh").write_text(VENV)
    for name in ("plain", "vllm"):
        (tmp_path / name).write_text(PYTHON)
        (tmp_path / name).chmod(0o755)
    command = ["bash", str(tmp_path / "tests" / "run.sh"), "--with-vllm"]
    done = subprocess.run(
        command, env=os.environ | {"FAILS": fails}, capture_output=True, check=False
    )
    assert done.returncode == code
    assert (tmp_path / "calls").read_text().splitlines() == calls
