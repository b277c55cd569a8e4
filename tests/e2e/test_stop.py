"""Ends that are no faults: signals, the time limit, no progress; the real job on real ranks.

Signals come as they do outside of tests: from a terminal, and to a whole process group.
"""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from tests.distributed.ranks import JOB, run_forked

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Return the arguments of an sft job of a tiny model."""
    folder = tmp_path_factory.mktemp("stop")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    write_jsonl(folder / "sft.jsonl", toy.generate_sft(0, 64))
    return [
        "sft",
        # SentencePiece alone is loaded sooner than a whole folder.
        f"tokenizer.path={folder / 'tok' / 'tokenizer.model'}",
        f"data.train_path={folder / 'sft.jsonl'}",
        *("model.hidden_size=32", "model.ffn_hidden_size=64", "sft.batch_size=4"),
        *("checkpoint.export_hf=false", "logging.tensorboard=false"),
    ]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def start(job, *options, **more):
    """Run the job in one process; return it when it has ended."""
    return run_forked(JOB, *job, *options, environment=more)


def numbers(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if not k.startswith(("time/", "perf/"))} for x in lines]


def wait_for_a_step(run_dir):
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 240
    while not (metrics.is_file() and metrics.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def interrupted_in_a_terminal(command, run_dir):
    """Run a command in a terminal of its own; press Ctrl-C after the first step.

    Returns:
        The exit code and what the terminal shows.
    """
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        # The first terminal that the leader of a session opens becomes that of the session.
        ["bash", "-c", f'exec "$@" <{os.ttyname(inside)} &>{os.ttyname(inside)}', "-", *command],
        env=environment(PYTHON=sys.executable),
        start_new_session=True,
    )
    shown = bytearray()

    def read():
        while True:
            try:
                shown.extend(os.read(terminal, 1 << 16))
            except OSError:  # nobody has it open any more
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_for_a_step(run_dir)
        os.write(terminal, b"\x03")
        code = process.wait(timeout=300)
    finally:
        process.kill()
        os.close(inside)
        reader.join()
        os.close(terminal)
    return code, shown.decode(errors="replace")


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    ("launcher", "code"),
    [
        (["bash", ROOT / "launch" / "torchrun.sh", "--ranks-per-node", "2"], 75),
        ([*TORCHRUN, "-m", "marlhf_mega"], 1),  # torchrun's own code after a signal
        ([sys.executable, "-m", "marlhf_mega"], 75),
    ],
    ids=["script", "torchrun", "one rank"],
)
def test_ctrl_c_in_a_terminal_ends_a_run_saved(job, tmp_path, launcher, code):
    command = [*map(str, launcher), *job, "run.steps=2000", f"run.dir={tmp_path}"]
    ended, shown = interrupted_in_a_terminal(command, tmp_path)
    assert ended == code, shown
    assert "asked to stop: the run saves after this step and ends" in shown
    done = int((tmp_path / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert f"asked to stop: saved after step {done}, start again" in shown
    assert 0 < done == numbers(tmp_path)[-1]["step"] < 2000


def test_a_signal_to_all_processes_and_another_during_the_save_end_a_run_saved_and_it_goes_on_bit_for_bit(
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
        start_new_session=True,
    )
    wait_for_a_step(run_dir)
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` and Slurm do
    deadline = time.monotonic() + 120
    while not [*run_dir.glob("checkpoints/*.tmp")]:  # the save has begun
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=300) == 75
    done = int((run_dir / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert numbers(run_dir)[-1]["step"] == done < 2000
    steps = f"run.steps={done + 3}"
    done = subprocess.run(
        [*launcher, *job, steps, f"run.dir={run_dir}"],
        env=environment(PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert run_forked(JOB, *job, steps, f"run.dir={whole}", ranks=2).returncode == 0
    assert numbers(run_dir) == numbers(whole)


def test_a_second_start_is_refused_and_a_removed_folder_ends_the_run(job, tmp_path):
    run_dir, code = tmp_path / "run", tmp_path / "code"
    options = ["run.steps=100000", f"run.dir={run_dir}"]
    with subprocess.Popen(
        [sys.executable, "-m", "marlhf_mega", *job, *options],
        env=environment(MARLHF_EXIT_CODE_FILE=str(code)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as first:
        try:
            wait_for_a_step(run_dir)
            second = start(job, *options)
            host = os.uname().nodename
            assert second.returncode == 2, second.stderr
            assert f"must not be in use; process {first.pid} on host {host} writes" in second.stderr
            shutil.rmtree(run_dir, ignore_errors=True)
            _, said = first.communicate(timeout=300)
        finally:
            first.kill()
    assert (first.returncode, code.read_text()) == (0, "1\n")  # not to be restarted
    assert "must stay as long as the run writes to it; it was removed" in said
    assert "Traceback" not in said


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
    assert "run.max_attempts=2: at most this many starts without a new checkpoint" in ended.stderr
    assert start(job, *options, "run.max_attempts=9").returncode == 1
