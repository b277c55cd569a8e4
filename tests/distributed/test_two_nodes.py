"""Two machines: network namespaces joined by a cable, each with its own launch/torchrun.sh."""

import json
import os
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

ROOT = Path(__file__).parents[2]
STEPS = 40

CABLE = """
set -e
mount -t tmpfs none /run/netns 2>/dev/null || { mkdir -p /run/netns; mount -t tmpfs none /run/netns; }
ip netns add a
ip netns add b
ip link add va netns a type veth peer name vb netns b
for node in "a 1" "b 2"; do
    set -- $node
    ip -n $1 addr add 10.9.0.$2/24 dev v$1
    ip -n $1 link set lo up
    ip -n $1 link set v$1 up
done
echo ready
exec sleep 600
"""


@pytest.fixture
def inside():
    """Return the command prefix that enters the two machines' world; it ends with the test."""
    for program in ("unshare", "nsenter", "ip", "mount"):
        if shutil.which(program) is None:
            pytest.skip(f"needs the program {program}")
    world = subprocess.Popen(
        ["unshare", "--net", "--mount", "bash", "-c", CABLE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if world.stdout.readline() != "ready\n":
        pytest.skip(f"no network namespaces here: {world.communicate()[1].strip()}")
    yield ["nsenter", "--target", str(world.pid), "--net", "--mount"]
    world.kill()
    world.communicate()


@pytest.fixture
def config(tmp_path):
    train_tokenizer(toy.tokenizer_text(0, 300), tmp_path / "tok", vocab_size=400)
    write_jsonl(tmp_path / "sft.jsonl", toy.generate_sft(0, 64))
    path = tmp_path / "config.json"
    sections = {
        "run": {"dir": str(tmp_path / "run"), "steps": STEPS},
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 400},
        "parallel": {"tensor_size": 2},
        "tokenizer": {"path": str(tmp_path / "tok" / "tokenizer.model")},
        "data": {"train_path": str(tmp_path / "sft.jsonl")},
        "sft": {"batch_size": 8, "microbatch_size": 4},
        "checkpoint": {"interval": 4, "export_hf": False},
        "logging": {"tensorboard": False},
    }
    path.write_text(json.dumps(sections))
    return path


def steps_done(run_dir):
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for_steps(run_dir, number, nodes, seconds=120):
    """Wait until there are more steps; return the seconds that took."""
    start = time.monotonic()
    while steps_done(run_dir) < number:
        assert time.monotonic() - start < seconds, f"still at step {steps_done(run_dir)}"
        assert all(node.poll() in (None, 0) for node in nodes), [node.poll() for node in nodes]
        time.sleep(0.05)
    return time.monotonic() - start


def ranks_of(launcher):
    """Process ids of the ranks below a torchrun.sh."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"TEST_NODE={launcher}".encode() in environment and any(
            entry.startswith(b"LOCAL_RANK=") for entry in environment
        ):
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_two_machines_survive_a_kill_and_a_pulled_cable(inside, config, tmp_path, capsys):
    nodes = []
    for rank, name in enumerate("ab"):
        command = [
            "bash",
            ROOT / "launch" / "torchrun.sh",
            "--nodes",
            "2",
            "--node-rank",
            str(rank),
        ]
        command += ["--ranks-per-node", "2", "--master", "10.9.0.1:29400", "--join-seconds", "60"]
        command += ["sft", "--config", config]
        environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"TEST_NODE": name, "OMP_NUM_THREADS": "1"}
        with (tmp_path / f"log_{name}").open("w") as log:
            nodes.append(
                subprocess.Popen(
                    [*inside, "ip", "netns", "exec", name, *command],
                    env=environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    run_dir = tmp_path / "run"
    try:
        started = wait_for_steps(run_dir, 6, nodes)
        os.kill(ranks_of("b")[0], signal.SIGKILL)
        rejoined = wait_for_steps(run_dir, steps_done(run_dir) + 6, nodes)
        subprocess.run([*inside, "ip", "-n", "b", "link", "set", "vb", "down"], check=True)
        time.sleep(5)
        before = steps_done(run_dir)
        subprocess.run([*inside, "ip", "-n", "b", "link", "set", "vb", "up"], check=True)
        reconnected = wait_for_steps(run_dir, before + 1, nodes)
        codes = [node.wait(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    assert codes == [0, 0]
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]
    assert steps[-1] == STEPS
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    with capsys.disabled():
        print(
            f"\ntwo machines: first steps after {started:.1f} s; SIGKILL to new steps {rejoined:.1f} s;"
            f" cable back to next step {reconnected:.1f} s"
        )
