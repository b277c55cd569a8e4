"""PPO with ranks that only generate, against the same job without; faults under the launcher."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from tests.distributed.ranks import JOB, run_forked

ROOT = Path(__file__).parents[2]
STALE = ("rollout.ranks=1", "rollout.staleness=1", "ppo.tis_cap=2")
OWN = {"rollout/staleness", "rollout/reshard_gib"}
"""Metrics that only such runs have."""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Return the arguments of a tiny PPO job of four steps that learns fast."""
    folder = tmp_path_factory.mktemp("rollout_ranks")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 64))
    return [
        "ppo",
        f"tokenizer.path={folder / 'tok'}",
        f"data.train_path={folder / 'prompts.jsonl'}",
        *("data.max_prompt_tokens=64", "run.steps=4", "logging.samples_interval=1"),
        *("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64"),
        *("rollout.batch_size=4", "rollout.samples_per_prompt=2", "rollout.max_response_tokens=12"),
        *("ppo.minibatch_size=4", "ppo.microbatch_size=2", "policy.lr=1e-2"),
        *("reward.source=marlhf_mega.data.toy:gold_reward", "checkpoint.interval=1"),
        *("checkpoint.export_hf=false", "logging.tensorboard=false"),
    ]


def launch(job, run_dir, *options, ranks, faults=""):
    here = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    launcher = ["bash", str(ROOT / "launch" / "torchrun.sh"), "--ranks-per-node", str(ranks)]
    return subprocess.Popen(
        [*launcher, "--restarts", "5", *job, f"run.dir={run_dir}", *options],
        env=os.environ | here | {"MARLHF_FAULT": faults},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(job, run_dir, *options, ranks):
    """Run the job to its end; return its metrics that do not measure time, and what it said."""
    done = run_forked(JOB, *job, f"run.dir={run_dir}", *options, ranks=ranks)
    assert done.returncode == 0, done.stderr[-6000:]
    return numbers(run_dir), done.stderr


def numbers(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if not re.match("time/|perf/|.*_per_s", k)} for x in lines]


def shared(lines):
    return [{k: v for k, v in line.items() if k not in OWN} for line in lines]


def responses(run_dir, step):
    lines = (run_dir / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    return [sample["response"] for sample in samples if sample["step"] == step]


@pytest.fixture(scope="module")
def together(job, tmp_path_factory):
    """Return the folder and the metrics of the same job on one rank that does everything."""
    folder = tmp_path_factory.mktemp("together")
    return folder, run(job, folder, ranks=1)[0]


@pytest.fixture(scope="module")
def stale(job, tmp_path_factory):
    """Return the folder and the metrics of a run that generates one step ahead."""
    folder = tmp_path_factory.mktemp("stale")
    return folder, run(job, folder, *STALE, ranks=2)[0]


def test_without_staleness_no_number_changes(job, together, tmp_path):
    found, _ = run(job, tmp_path, "rollout.ranks=1", ranks=2)
    assert shared(found) == together[1]
    assert [line["rollout/staleness"] for line in found] == [0] * 4


def test_either_side_has_a_layout_of_its_own(job, together, tmp_path):
    layout = ("rollout.ranks=2", "parallel.tensor_size=2", "rollout.tensor_size=1")
    found, _ = run(job, tmp_path, *layout, "model.tied_embeddings=false", ranks=4)
    for line, expected in zip(shared(found), together[1], strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_first_two_steps_are_answered_by_the_first_weights(job, stale, together, tmp_path):
    """A policy that rests in step 1 answers step 2 by the same weights."""
    run(job, tmp_path, "ppo.critic_only_steps=1", "run.steps=2", ranks=1)
    folder, found = stale
    for step in (1, 2):
        assert responses(folder, step) == responses(tmp_path, step)
    assert responses(folder, 2) != responses(together[0], 2)
    assert [line["rollout/staleness"] for line in found] == [1] * 4


def test_trainer_and_sampler_differ_by_one_update(stale):
    """The first samples are by the weights that train on them; all others by older ones."""
    gaps = [line["rollout/logprob_gap"] for line in stale[1]]
    assert gaps[0] < 1e-6
    assert min(gaps[1:]) > 1e-3


def test_faults_of_a_rank_that_generates_change_no_number(job, stale, tmp_path):
    """Samples that wait for their step survive in the checkpoint."""
    faults = "rank=1,step=3,phase=rollout,kind=kill;rank=1,step=4,phase=rollout,kind=hang"
    options = ("watchdog.seconds=8", *STALE)
    process = launch(job, tmp_path, *options, ranks=2, faults=faults)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said[-6000:]
    assert numbers(tmp_path) == stale[1]
    named = re.search(r"rank 1 has been in step 4, rollout, for [\d.]+ s at (.*)\. All", said)
    assert named is not None, said[-6000:]
    assert "resilience/fault_injection.py" in named[1]
    assert len([*(tmp_path / "faults").iterdir()]) == 2


def test_a_run_goes_on_at_another_layout_with_the_samples_that_wait(job, stale, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(stale[0], run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_000004")
    (run_dir / "checkpoints" / "latest").write_text("step_000003\n")
    other = (*STALE, "rollout.ranks=2", "rollout.tensor_size=2")
    found, said = run(job, run_dir, *other, ranks=3)
    assert "resuming from" in said
    assert shared(found)[:3] == shared(stale[1])[:3]
    assert shared(found)[3] == pytest.approx(shared(stale[1])[3], rel=1e-4, abs=1e-5)
    assert responses(run_dir, 4) == responses(stale[0], 4)


def test_a_signal_ends_both_sides_saved_and_the_run_goes_on_to_the_bit(job, stale, tmp_path):
    slow = "rank=0,step=1,phase=update,kind=slow,seconds=0.5"
    process = launch(job, tmp_path, *STALE, ranks=2, faults=slow)
    deadline = time.monotonic() + 180
    while not ((tmp_path / "metrics.jsonl").is_file() and numbers(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 75, said[-6000:]
    assert len(numbers(tmp_path)) < 4
    assert run(job, tmp_path, *STALE, ranks=2)[0] == stale[1]
