"""PPO whose samples come from a vLLM engine, and what a killed rank changes of it: nothing."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marlhf_mega.config.exit_codes import EXIT_HUNG
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from tests.distributed.ranks import run_forked
from tests.vllm.installed import needs_vllm

pytestmark = needs_vllm

ROOT = Path(__file__).parents[2]
LAUNCHER = (
    *("bash", str(ROOT / "launch" / "torchrun.sh"), "--ranks-per-node", "2"),
    *("--restarts", "3"),
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Return the arguments of a tiny PPO run that trains at TP2 and generates at TP2."""
    folder = tmp_path_factory.mktemp("vllm_runs")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 64))
    write_jsonl(folder / "held_out.jsonl", toy.generate_prompts(0, 4, held_out=True))
    return [
        *("ppo", f"tokenizer.path={folder / 'tok'}"),
        *(f"data.train_path={folder / 'prompts.jsonl'}", "data.max_prompt_tokens=64"),
        f"data.validation_path={folder / 'held_out.jsonl'}",
        *("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64"),
        *("model.num_attention_heads=2", "model.head_dim=32", "parallel.tensor_size=2"),
        *("rollout.engine=vllm", "rollout.vllm.enforce_eager=true", "rollout.batch_size=4"),
        *("rollout.samples_per_prompt=2", "rollout.max_response_tokens=12", "rollout.stop=[un]"),
        *("ppo.minibatch_size=4", "ppo.microbatch_size=2", "policy.lr=1e-2", "run.steps=3"),
        *("reward.source=marlhf_mega.data.toy:gold_reward", "logging.samples_interval=1"),
        *("checkpoint.interval=1", "checkpoint.export_hf=false", "logging.tensorboard=false"),
    ]


def start(job, folder, *, faults=""):
    """Start the job through the launcher."""
    here = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    return subprocess.Popen(
        [*LAUNCHER, *job, f"run.dir={folder}"],
        env=os.environ | here | {"MARLHF_FAULT": faults},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process, folder):
    """Wait for the end of a job; return its metrics and its samples."""
    with process:
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, out[-2000:] + err[-6000:]
    lines, samples = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "samples.jsonl")
    )
    return lines, samples


def run(job, folder, *, faults=""):
    return end(start(job, folder, faults=faults), folder)


def shared_memory():
    return set(Path("/dev/shm").iterdir())


@pytest.fixture(scope="module")
def together(job, tmp_path_factory):
    """Run the job twice at the same time; return both results, and what is left of them."""
    before = shared_memory()
    folders = [tmp_path_factory.mktemp("undisturbed") for _ in range(2)]
    started = [start(job, folder) for folder in folders]
    results = [end(*each) for each in zip(started, folders, strict=True)]
    return results, shared_memory() - before


@pytest.fixture(scope="module")
def undisturbed(together):
    return together[0][0]


def numbers(lines):
    timed = "time/|perf/|.*_per_s"
    return [{k: v for k, v in line.items() if not re.match(timed, k)} for line in lines]


def test_samples_are_those_of_the_policy_that_trains_on_them(undisturbed):
    lines, _ = undisturbed
    steps = [line for line in lines if "rollout/logprob_gap" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        assert line["rollout/logprob_gap_max"] < 1e-5
        assert line["time/reshard_seconds"] > 0
        assert line["rollout/reshard_gib"] > 0
    assert len({line["policy/entropy"] for line in steps}) == 3


def test_two_runs_of_one_machine_do_not_meet(together):
    (first, second), left = together
    assert numbers(first[0]) == numbers(second[0])
    assert first[1] == second[1]
    assert not left


def test_a_rank_that_is_killed_in_a_decode_step_ends_the_run_and_nothing_is_left(job, tmp_path):
    before = shared_memory()
    script = Path(__file__).parent / "killed_job.py"
    done = run_forked(script, tmp_path, *job, f"run.dir={tmp_path / 'run'}", ranks=2)
    seconds = time.time() - (tmp_path / "1").stat().st_mtime
    # Of the rank that is left: -9 if it had to be killed.
    assert done.returncode == EXIT_HUNG, done.stderr[-3000:]
    (found,) = re.findall(r"no rank may end before the others; rank (.*?), for", done.stderr)
    assert re.sub(r"\d{2,}", "N", found) == "1 ended in step 1, rollout: process N was killed"
    print(f"ended {seconds:.1f} s after the kill")
    processes = " ".join((tmp_path / str(rank)).read_text() for rank in range(2)).split()
    end = time.monotonic() + 20  # workers see by themselves that they are alone
    while (alive := [p for p in processes if Path("/proc", p).exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    assert alive == []
    assert shared_memory() - before == set()


def test_a_killed_rank_changes_no_number(job, undisturbed, tmp_path):
    """Its peer is in the middle of a move of weights or of a decode step."""
    found = run(job, tmp_path, faults="rank=1,step=2,phase=rollout,kind=kill")
    assert numbers(found[0]) == numbers(undisturbed[0])
    assert found[1] == undisturbed[1]
    assert len([*(tmp_path / "faults").iterdir()]) == 1


@pytest.mark.parametrize("staleness", [0, 1])
def test_ranks_that_only_generate_may_have_the_engine(job, undisturbed, staleness, tmp_path):
    """One rank trains, one generates: the samples of the first step are those of TP2."""
    options = ["parallel.tensor_size=1", "rollout.ranks=1", f"rollout.staleness={staleness}"]
    lines, samples = run([*job, *options, *(["ppo.tis_cap=2"] if staleness else [])], tmp_path)
    steps = [line for line in lines if "rollout/logprob_gap" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    # Weights are a step old from the second step on, and so are the log-probs of the samples.
    gaps = [line["rollout/logprob_gap_max"] for line in steps]
    assert [gap < 1e-5 for gap in gaps] == [True, not staleness, not staleness]
    first, wanted = (
        [s["response"] for s in x if s["step"] == 1] for x in (samples, undisturbed[1])
    )
    assert first == wanted
