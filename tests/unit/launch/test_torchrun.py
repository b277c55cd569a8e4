"""launch/torchrun.sh: its command and environment, its refusals, and what it passes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TWO_NODES = ("--nodes", "2", "--master", "127.0.0.1:1234", "--run-id", "my-run")


def test_one_machine_without_gpus(launch, same_as_golden):
    done = launch("torchrun.sh", "--dry-run", "--ranks-per-node", "4", "ppo", "run.name=a b")
    assert (done.returncode, done.stderr) == (0, "")
    same_as_golden(done.stdout, "one_machine_cpu.txt")


def test_one_machine_with_eight_hopper_gpus(launch, gpus, same_as_golden):
    gpus(8, "9.0")
    done = launch("torchrun.sh", "--dry-run", "ppo", "parallel.tensor_size=2")
    same_as_golden(done.stdout, "one_machine_hopper_tp2.txt")


def test_the_second_of_two_machines(launch, gpus, program, same_as_golden):
    gpus(8, "9.0")
    program(
        "ip",
        """case "$*" in
        *route*) echo "127.0.0.1 via 10.0.0.1 dev ib3 src 10.0.0.8" ;;
        *'dev ib3'*) echo "3: ib3 inet 10.0.0.8/24 scope global ib3" ;;
        esac""",
    )
    done = launch("torchrun.sh", *TWO_NODES, "--node-rank", "1", "--exact", "--dry-run", "sft")
    same_as_golden(done.stdout, "two_machines_exact.txt")


def test_kubeflow_says_what_the_options_do_not(launch, program, same_as_golden):
    program("ip", "echo '2: eth7 inet 10.0.0.7/24 scope global eth7'")
    program("getent", "echo '10.0.0.7 STREAM trainer-0'")
    pet = {"PET_NNODES": "4", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "8"}
    pet |= {"PET_MASTER_ADDR": "trainer-0", "PET_MASTER_PORT": "29500"}
    same_as_golden(launch("torchrun.sh", "--dry-run", "ppo", **pet).stdout, "kubeflow_master.txt")


def test_blackwell_is_not_held_to_one_connection(launch, gpus):
    gpus(4, "10.0")
    out = launch("torchrun.sh", "--dry-run", "ppo", "parallel.tensor_size=2").stdout
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in out
    assert "NVTE_FWD_LAYERNORM_SM_MARGIN=16" in out


def test_tensor_parallelism_may_come_from_the_file(launch, gpus, tmp_path):
    gpus(4, "8.0")
    (tmp_path / "c.yaml").write_text("parallel: {tensor_size: 4}\n")
    out = launch("torchrun.sh", "--dry-run", "ppo", "--config", "c.yaml").stdout
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1\n" in out


def test_what_the_user_has_set_wins(launch, gpus):
    gpus(4, "9.0")
    user = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "NCCL_NVLS_ENABLE": ""}
    user["PYTORCH_ALLOC_CONF"] = "backend:native"
    done = launch("torchrun.sh", "--dry-run", "ppo", "parallel.tensor_size=2", **user)
    lines = done.stdout.splitlines()
    assert "CUDA_DEVICE_MAX_CONNECTIONS=8" in lines
    assert "NCCL_NVLS_ENABLE=" in lines
    assert not any(line.startswith("PYTORCH_CUDA_ALLOC_CONF") for line in lines)


def test_visible_gpus_are_counted_and_hidden_ones_are_not_used(launch, gpus):
    gpus(8, "9.0")
    two = launch("torchrun.sh", "--dry-run", "ppo", CUDA_VISIBLE_DEVICES="4,5").stdout
    assert "--nproc-per-node 2 " in two
    none = launch("torchrun.sh", "--dry-run", "ppo", CUDA_VISIBLE_DEVICES="").stdout
    assert "--nproc-per-node 1 " in none
    assert "NCCL" not in none


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nodes", "0", "ppo"], "--nodes=0: must be at least 1. Change it."),
        (["--nodes", "two", "ppo"], "--nodes=two: must be a whole number. Change it."),
        (
            ["--nodes", "2", "--node-rank", "2", "--master", "a", "ppo"],
            "--node-rank=2: must be below --nodes=2. Number machines from 0.",
        ),
        (
            ["--nodes", "2", "ppo"],
            "--master: 2 machines need the address of the first. Give HOST or HOST:PORT.",
        ),
        (["--node", "2", "ppo"], "--node: unknown option. See --help."),
        (["--nodes"], "--nodes: needs a value. See --help."),
        (["--dry-run"], "launch/torchrun.sh: needs a command such as ppo; none was given. See --help."),
        (["plan"], "plan: runs without ranks. Run marlhf plan instead."),
        (["ppo", "ppo.epoch=2"], "ppo.epoch: unknown key. Did you mean ppo.epochs?"),
        (["--dry-run", "ppo", "ppo.epoch=2"], "ppo.epoch: unknown key. Did you mean ppo.epochs?"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_code_2(launch, arguments, line):
    done = launch("torchrun.sh", *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line + "\n")


def test_the_check_knows_the_size_of_the_world(launch, program):
    python = program("only-checks", 'echo "world of $WORLD_SIZE: $*" >&2; exit 2')
    done = launch("torchrun.sh", *TWO_NODES, "--ranks-per-node", "3", "sft", PYTHON=str(python))
    assert done.returncode == 2
    assert done.stderr == "world of 6: -m marlhf_mega sft --check --print-config\n"


def test_a_job_that_is_complete_is_not_started(launch, program):
    said = "already complete: runs/my has the results"
    python = program("only-checks", f'echo "{said}"; echo "  runs/my/hf"; exit 0')
    done = launch("torchrun.sh", "sft", PYTHON=str(python))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{said}\n  runs/my/hf\n", "")


@pytest.fixture
def stand_in(program, tmp_path):
    """A Python whose `marlhf_mega` is the test's own script of ranks; the rest is real."""

    def make(rank_program: str) -> str:
        script = tmp_path / "ranks.py"
        script.write_text(rank_program)
        path = program(
            "stand-in-python",
            f"""arguments=()
            for argument in "$@"; do
                [[ $argument != --check ]] || exit 0
                arguments+=("$argument")
            done
            for i in "${{!arguments[@]}}"; do
                if [[ ${{arguments[i]}} == marlhf_mega ]]; then
                    arguments[i - 1]={script}
                    unset "arguments[i]"
                    break
                fi
            done
            exec {sys.executable} "${{arguments[@]}}" """,
        )
        return str(path)

    return make


@pytest.mark.parametrize("code", [75, 76])
def test_a_run_that_must_end_is_not_restarted_and_its_code_is_passed_on(
    launch, stand_in, tmp_path, code
):
    python = stand_in(
        "import os, pathlib\n"
        f"pathlib.Path({str(tmp_path)!r}, 'starts').open('a').write('x')\n"
        f"pathlib.Path(os.environ['MARLHF_EXIT_CODE_FILE']).write_text('{code}\\n')\n"
    )
    done = launch("torchrun.sh", "ppo", PYTHON=python)
    assert done.returncode == code, done.stderr
    assert (tmp_path / "starts").read_text() == "x"


def test_a_failure_is_restarted_and_in_the_end_is_exit_code_1(launch, stand_in, tmp_path):
    python = stand_in(
        "import pathlib, sys\n"
        f"pathlib.Path({str(tmp_path)!r}, 'starts').open('a').write('x')\n"
        "sys.exit(9)\n"
    )
    done = launch("torchrun.sh", "--restarts", "2", "ppo", PYTHON=python)
    assert done.returncode == 1
    assert (tmp_path / "starts").read_text() == "xxx"


SAVES_WHEN_ASKED = """
import os, pathlib, time
here = pathlib.Path({here!r})
(here / f"up{{os.environ['RANK']}}").touch()
while not pathlib.Path(os.environ["MARLHF_STOP_FILE"]).exists():
    time.sleep(0.05)
time.sleep(1.0)
(here / f"saved{{os.environ['RANK']}}").touch()
pathlib.Path(os.environ["MARLHF_EXIT_CODE_FILE"]).write_text("75\\n")
"""


def start(python, command="ppo"):
    """Start a command on two ranks in a process group of its own."""
    return subprocess.Popen(
        ["bash", ROOT / "launch" / "torchrun.sh", "--ranks-per-node", "2", command],
        env=os.environ | {"PYTHON": python, "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
    )


def wait_for(*paths):
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_after_a_signal_to_all_processes_the_ranks_may_take_their_time(stand_in, tmp_path, number):
    process = start(stand_in(SAVES_WHEN_ASKED.format(here=str(tmp_path))))
    wait_for(tmp_path / "up0", tmp_path / "up1")
    os.killpg(process.pid, number)
    time.sleep(0.4)
    os.killpg(process.pid, number)
    assert process.wait(timeout=300) == 75
    assert [(tmp_path / f"saved{rank}").exists() for rank in range(2)] == [True, True]


def commands_of_children(pid):
    found = ""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has ended
            found += Path(f"/proc/{child}/cmdline").read_text()
    return found


def test_a_request_that_comes_before_the_ranks_is_kept_for_them(stand_in, tmp_path):
    process = start(stand_in(SAVES_WHEN_ASKED.format(here=str(tmp_path))))
    while "torch.distributed.run" not in commands_of_children(process.pid):
        time.sleep(0.01)
    assert not (tmp_path / "up0").exists()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=300) == 75
    assert (tmp_path / "saved0").exists()


def test_what_saves_nothing_ends_at_once(stand_in, tmp_path):
    process = start(stand_in(SAVES_WHEN_ASKED.format(here=str(tmp_path))), "evaluate")
    wait_for(tmp_path / "up0", tmp_path / "up1")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) not in (0, 75)
    assert not (tmp_path / "saved0").exists()


OUTLIVES_NOBODY = """
import os, pathlib, time
from marlhf_mega.lifeline import die_with_launcher
die_with_launcher()
path = pathlib.Path({here!r}, "up" + os.environ["RANK"])
path.with_suffix(".tmp").write_text(f"{{os.getppid()}} {{os.getpid()}}")
path.with_suffix(".tmp").rename(path)
time.sleep(600)
"""


@pytest.mark.parametrize("killed", ["script", "torchrun"])
def test_nothing_outlives_a_launcher_that_is_killed(stand_in, tmp_path, killed):
    process = start(stand_in(OUTLIVES_NOBODY.format(here=str(tmp_path))))
    up = [tmp_path / "up0", tmp_path / "up1"]
    wait_for(*up)
    launcher, *_ = pids = [int(text) for path in up for text in path.read_text().split()]
    os.kill(process.pid if killed == "script" else launcher, signal.SIGKILL)
    assert process.wait(timeout=300) not in (0, 75)
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    """Whether a process is there, and not only its entry in the table."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


REJOINS = """
import os, signal, sys, pathlib
from datetime import timedelta
import torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=timedelta(seconds=20))
kills, rank = pathlib.Path({out!r}), dist.get_rank()
killed = len(kills.read_text()) if kills.exists() else 0
total = torch.tensor([float(rank)])
for _ in range(3):
    dist.all_reduce(total)
if killed < 3 and rank == killed:
    kills.open("a").write("x")
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
if rank == 0:
    kills.open("a").write(" restarts: " + os.environ["TORCHELASTIC_RESTART_COUNT"])
dist.destroy_process_group()
"""


def test_killed_ranks_rejoin_at_every_restart(launch, stand_in, tmp_path):
    python = stand_in(REJOINS.format(out=str(tmp_path / "kills")))
    done = launch("torchrun.sh", "--ranks-per-node", "3", "--restarts", "8", "ppo", PYTHON=python,
                  timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    # Between torchrun's choice of a free port and rank 0, another program may take it.
    lost_ports = done.stderr.count("DistNetworkError: The server socket has failed to listen")
    assert (tmp_path / "kills").read_text() == f"xxx restarts: {3 + lost_ports}"
