"""What the acceptance script does where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "tools" / "gpu_acceptance.sh"


def acceptance(*arguments):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_a_gpu_it_ends_with_one_line():
    done = acceptance()
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "needs a CUDA device" in done.stderr


def test_a_dry_run_names_files_that_exist():
    done = acceptance("--dry-run")
    assert done.returncode == 0
    words = done.stdout.split()
    paths = [word for word in words if word.startswith(("tools/", "tests/"))]
    assert len(paths) >= 6
    assert all((SCRIPT.parents[1] / path).exists() for path in paths)


def test_an_unknown_argument_is_refused():
    done = acceptance("--fast")
    assert done.returncode == 2
    assert done.stderr == "--fast: unknown argument. See --help.\n"
