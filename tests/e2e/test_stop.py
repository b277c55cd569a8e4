"""Ends that are no faults: signals, the time limit, no progress; the real job on real ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Return the arguments of an sft job of a tiny model."""
    folder = tmp_path_factory.mktemp("stop")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    write_jsonl(folder / "sft.jsonl", toy.generate_sft(0, 64))
    return [
        "sft",
        f"tokenizer.path={folder / 'tok'}",
        f"data.train_path={folder / 'sft.jsonl'}",
        *("model.hidden_size=32", "model.ffn_hidden_size=64", "sft.batch_size=4"),
        *("checkpoint.export_hf=false", "logging.tensorboard=false"),
    ]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def start(job, *options, **more):
    """Run the job in one process; return it when it has ended."""
    return subprocess.run(
        [sys.executable, "-m", "marlhf_mega", *job, *map(str, options)],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def numbers(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if not k.startswith(("time/", "perf/"))} for x in lines]


def test_a_signal_and_another_during_the_save_end_a_run_saved_and_it_goes_on_bit_for_bit(
    job, tmp_path
):
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    background = ["checkpoint.async_save=true", "checkpoint.interval=2"]
    launcher = ["bash", ROOT / "launch" / "torchrun.sh", "--ranks-per-node", "2"]
    process = subprocess.Popen(
        [*launcher, *job, "run.steps=2000", f"run.dir={run_dir}", *background],
        env=environment(PYTHON=sys.executable),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.is_file() and metrics.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    while not [*run_dir.glob("checkpoints/*.tmp")]:  # the save has begun
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    done = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert numbers(run_dir)[-1]["step"] == done < 2000
    steps = f"run.steps={done + 3}"
    done = subprocess.run(
        [*launcher, *job, steps, f"run.dir={run_dir}"],
        env=environment(PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    subprocess.run(
        [*launcher, *job, steps, f"run.dir={whole}"],
        env=environment(PYTHON=sys.executable),
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert numbers(run_dir) == numbers(whole)


def test_a_run_ends_when_its_time_is_up(job, tmp_path):
    done = start(job, "run.steps=50", "run.max_hours=1e-7", f"run.dir={tmp_path}")
    assert done.returncode == 75
    assert "asked to stop: saved after step 1, start again" in done.stderr
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_000001\n"


def test_a_run_that_gets_nowhere_ends_for_good(job, tmp_path):
    """The second step always fails; a launcher starts the run three times."""
    code = tmp_path / "code"
    options = [
        *("run.steps=9", "run.max_attempts=2", "run.max_skipped_steps=0", "policy.lr=1e30"),
        f"run.dir={tmp_path / 'run'}",
    ]
    for _ in range(2):
        failed = start(job, *options, MARLHF_EXIT_CODE_FILE=str(code))
        assert failed.returncode == 1
        assert "run.max_skipped_steps=0: no more optimizer steps may be skipped" in failed.stderr
    ended = start(job, *options, MARLHF_EXIT_CODE_FILE=str(code))
    assert ended.returncode == 0
    assert code.read_text() == "76\n"
    assert "run.max_attempts=2: so many starts from step 0 have not led to" in ended.stderr
    assert start(job, *options, "run.max_attempts=9").returncode == 1
