"""Faults in the middle of a run: the real launcher, real ranks, one fault after another."""

import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from tests.distributed.ranks import JOB, run_forked

ROOT = Path(__file__).parents[2]
NUM_RANKS = 2


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Return the arguments of a tiny PPO run that saves after every step."""
    folder = tmp_path_factory.mktemp("faults")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 64))
    return [
        # SentencePiece alone is loaded sooner, in every rank that starts again.
        *("ppo", f"tokenizer.path={folder / 'tok' / 'tokenizer.model'}"),
        *(f"data.train_path={folder / 'prompts.jsonl'}", "data.max_prompt_tokens=64"),
        *("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64"),
        *("rollout.batch_size=4", "rollout.max_response_tokens=12"),
        *("ppo.minibatch_size=4", "ppo.microbatch_size=2", "policy.lr=1e-3"),
        *("reward.source=marlhf_mega.data.toy:gold_reward", "reward.normalize=running"),
        *("checkpoint.interval=1", "checkpoint.export_hf=false", "logging.tensorboard=false"),
    ]


LAUNCHER = (
    *("bash", str(ROOT / "launch" / "torchrun.sh"), "--ranks-per-node", str(NUM_RANKS)),
    *("--restarts", "25"),
)


def environment(**more):
    here = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    return os.environ | here | more


def start(job, run_dir, *options, faults="", timeout=300):
    """Run the job to its end; return what it wrote to the terminal."""
    done = subprocess.run(
        [*LAUNCHER, *job, f"run.dir={run_dir}", *options],
        env=environment(MARLHF_FAULT=faults),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stderr


def undisturbed(job, run_dir, *options):
    """Return the metrics of a run without a fault, which needs no launcher."""
    done = run_forked(JOB, *job, f"run.dir={run_dir}", *options, ranks=NUM_RANKS)
    assert done.returncode == 0, done.stderr[-6000:]
    return numbers(run_dir)


def numbers(run_dir):
    """Return the metrics that do not measure time."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            k: v
            for k, v in line.items()
            if not k.startswith(("time/", "perf/")) and "_per_s" not in k
        }
        for line in lines
    ]


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """Return the metrics of four steps without a fault."""
    return undisturbed(job, tmp_path_factory.mktemp("whole"), "run.steps=4")


def test_a_rank_that_stops_loops_or_ends_is_named_in_time_and_the_run_goes_on(job, whole, tmp_path):
    limit = 10
    said = start(
        job,
        tmp_path,
        *("run.steps=4", f"watchdog.seconds={limit}"),
        faults="rank=1,step=2,phase=update,kind=stop;rank=0,step=3,phase=experience,kind=hang;"
        "rank=1,step=4,phase=rollout,kind=exit;rank=1,step=4,phase=update,kind=kill",
    )
    assert "rank 1 was last seen in step 2, update; no answer: stopped, or the machine" in said
    found = re.search(r"rank 0 has been in step 3, experience, for [\d.]+ s at (.*)\. All", said)
    assert found is not None
    assert "resilience/fault_injection.py" in found[1]
    assert numbers(tmp_path) == whole
    assert len([*(tmp_path / "faults").iterdir()]) == 4
    # A rank that ends is named by its neighbour, with the reason instead of a broken connection.
    ended = re.findall(r"no rank may end before the others; rank (\d) ended in (.*?)\. The", said)
    assert [(rank, re.sub(r"\d{2,}", "N", what)) for rank, what in ended] == [
        ("1", "step 4, rollout: SystemExit: 1"),
        ("1", "step 4, update: process N was killed, for example because memory ran out"),
    ]
    assert "Traceback" not in said
    assert "Connection" not in said
    stopped, looping = sorted((tmp_path / "stacks").iterdir())[:2]
    assert {f.name for f in stopped.iterdir()} == {"rank_00000.txt", "summary.txt"}
    assert {f.name for f in looping.iterdir()} == {
        "rank_00000.txt",
        "rank_00001.txt",
        "summary.txt",
    }
    assert "all_reduce" in (looping / "rank_00001.txt").read_text()
    assert "_happen_once" in (looping / "rank_00000.txt").read_text()
    for number, folder in enumerate((stopped, looping)):
        fault = (tmp_path / "faults" / f"{number:03d}").stat().st_mtime
        seconds = (folder / "summary.txt").stat().st_mtime - fault
        print(f"named {seconds - limit:.1f} s after the limit of {limit} s")
        assert limit <= seconds < limit + 5


def test_a_slow_rank_is_named_and_a_gradient_of_one_rank_stops_all(job, tmp_path):
    said = start(
        job,
        tmp_path,
        *("run.steps=7", "checkpoint.interval=0"),
        faults="rank=1,step=1,phase=update,kind=slow,seconds=2;rank=1,step=7,phase=update,kind=nan",
    )
    named = re.findall(r"rank 1 is slow: in update it took \S+ s in step [567],", said)
    assert len(named) == 1  # in the fifth step in a row
    assert "rank 0 is slow" not in said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["time/update_slowest_rank"] == 1
        assert line["time/update_max_seconds"] > 1.5
        assert line["time/update_max_seconds"] - line["time/update_min_seconds"] > 1
    assert [line["critic/skipped_fraction"] for line in lines] == [0, 0, 0, 0, 0, 0, 1]


def kills():
    """Kill either rank in each phase, in drawn order; a step without a fault lies between two."""
    draw = random.Random(20)
    places = [*product(range(NUM_RANKS), ("rollout", "experience", "update", "checkpoint"))]
    draw.shuffle(places)
    for step, (rank, phase) in zip(range(2, 100, 2), places, strict=False):
        seconds = draw.choice((0, 0.02, 0.05))
        yield step, f"rank={rank},step={step},phase={phase},kind=kill,seconds={seconds}"


@pytest.mark.slow
def test_kills_in_every_phase_change_no_number_and_cost_a_step_each(job, tmp_path, capsys):
    steps, faults = zip(*kills(), strict=True)
    run_dir, num_steps = tmp_path / "run", f"run.steps={steps[-1] + 1}"
    whole = undisturbed(job, tmp_path / "whole", num_steps, "checkpoint.interval=0")
    process = subprocess.Popen(
        [*LAUNCHER, *job, f"run.dir={run_dir}", num_steps],
        env=environment(MARLHF_FAULT=";".join(faults)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    resumed, stepped, said = [], [], []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"resuming from .*step_(\d+)$", line):
            resumed.append(int(found[1]))
        elif " ppo step " in line and len(stepped) < len(resumed):
            stepped.append(time.time())
    assert process.wait(timeout=300) == 0, "".join(said)[-6000:]
    assert numbers(run_dir) == whole
    assert len(resumed) == len(steps) == 8
    for step, start_step in zip(steps, resumed, strict=True):
        assert start_step in (step - 1, step)
    killed = sorted(mark.stat().st_mtime for mark in (run_dir / "faults").iterdir())
    seconds = [later - earlier for earlier, later in zip(killed, stepped, strict=True)]
    with capsys.disabled():
        print(
            f"\n{len(steps)} kills: {statistics.median(seconds):.1f} s (median) from a kill to the end of "
            f"the next step; fastest {min(seconds):.1f} s, slowest {max(seconds):.1f} s"
        )
