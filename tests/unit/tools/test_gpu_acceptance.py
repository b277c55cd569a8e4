"""What the acceptance script does where there is no GPU: everything, at tiny sizes."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "tools" / "gpu_acceptance.sh"
STEPS = ["answers", "decode", "attention", "training", "copies", "quickstart", "fp8"]
WORKER = """
import json, os, sys, time
with os.fdopen(int(sys.argv[1]), "w") as results:
    for name in sys.argv[2:]:
        print("working on", name, flush=True)
        if name == "attention":
            time.sleep(600)
        if name == "copies":
            os.abort()
        passed = name != "quickstart"
        result = {"passed": passed, "machine": {"device": "none"}}
        results.write(json.dumps(result | {"process": os.getpid()}) + "\\n")
        results.flush()
        if not passed:
            sys.exit(1)
"""


def acceptance(*arguments, **more):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | more,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent / "acceptance"))
    return importlib.import_module("driver")


def test_without_a_gpu_it_ends_with_one_line():
    done = acceptance()
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "needs a CUDA device" in done.stderr


def test_an_unknown_argument_is_refused():
    done = acceptance("--fast")
    assert done.returncode == 2
    assert done.stderr == "--fast: unknown argument. See --help.\n"


@pytest.mark.slow
def test_a_dry_run_takes_every_step(tmp_path):
    """OUT is where the file goes unless --out says it."""
    done = acceptance("--dry-run", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "acceptance.json").read_text())
    assert list(found["steps"]) == STEPS
    assert all(step["passed"] for step in found["steps"].values())
    assert found["device"] == "cpu"
    assert found["steps"]["fp8"]["skipped"] == "there is no CUDA device"
    results = {name: step.get("found") for name, step in found["steps"].items()}
    # A CPU is as far from float32 in bfloat16 as the CPU was that made the references.
    assert results["answers"]["bfloat16_values_error_over_cpu"] == pytest.approx(1, rel=0.2)
    assert results["decode"]["batch_4"]["operators"] > 20
    assert results["decode"]["batch_4"]["launches"] == 0
    assert results["training"]["head"].keys() == {"chunk_2^24", "chunk_2^26", "chunk_2^28"}
    assert results["attention"]["math"]["ms"] > 0
    assert "wrote the checkpoint" in (tmp_path / "acceptance.log").read_text()


def test_a_step_that_hangs_crashes_or_fails_costs_only_itself(
    tmp_path, driver, monkeypatch, capsys
):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(driver, "WORKER", worker)
    monkeypatch.setattr(driver, "SECONDS", dict.fromkeys(STEPS, 60) | {"attention": 0.2})
    assert not driver.run(STEPS, tmp_path, dry_run=True)
    found = json.loads((tmp_path / "acceptance.json").read_text())["steps"]
    assert [name for name, step in found.items() if step["passed"]] == [
        *("answers", "decode", "training", "fp8")
    ]
    assert found["attention"]["error"] == "not done after 0 s; ended"
    assert found["copies"]["error"] == "the process ended with code -6"
    assert found["copies"]["log"][-1] == "working on copies"
    first, second, third = (found[name]["process"] for name in ("decode", "training", "fp8"))
    assert found["answers"]["process"] == first
    assert len({first, second, third}) == 3
    assert "FAILED; see" in capsys.readouterr().out


def test_the_times_of_all_steps_are_six_minutes(driver):
    assert list(driver.SECONDS) == STEPS
    assert sum(driver.SECONDS.values()) <= 360
