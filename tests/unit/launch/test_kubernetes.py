"""The Kubernetes files agree with each other, with the launcher, and with its exit codes."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]


@pytest.fixture
def runtime():
    return yaml.safe_load((ROOT / "launch/kubernetes/runtime.yaml").read_text())


@pytest.fixture
def job():
    return yaml.safe_load((ROOT / "launch/kubernetes/trainjob.yaml").read_text())


def _job_spec(runtime):
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_the_job_names_the_runtime(runtime, job):
    reference = job["spec"]["runtimeRef"]
    assert reference["name"] == runtime["metadata"]["name"]
    assert reference["kind"] == runtime["kind"]
    assert runtime["apiVersion"] == job["apiVersion"] == f"{reference['apiGroup']}/v1alpha1"


def test_the_exit_codes_decide_what_is_restarted(runtime):
    spec = _job_spec(runtime)
    codes = {
        code: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert codes == {2: "FailJob", 76: "FailJob", 75: "Ignore"}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # a failure policy demands it


def test_every_mount_has_a_volume_and_shared_memory_is_one(runtime):
    pod = _job_spec(runtime)["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == volumes
    assert "/dev/shm" in mounts
    rules = _job_spec(runtime)["podFailurePolicy"]["rules"]
    assert {r["onExitCodes"]["containerName"] for r in rules if "onExitCodes" in r} == {"node"}
    assert container["name"] == "node"  # the operator looks for this name


def test_the_command_reaches_the_launcher(job, tmp_path):
    trainer = job["spec"]["trainer"]
    (tmp_path / "ppo.yaml").write_text("run: {name: a}\n")
    arguments = [
        str(tmp_path / "ppo.yaml") if x.endswith("ppo.yaml") else x for x in trainer["args"]
    ]
    environment = {
        "MARLHF_ROOT": str(ROOT),
        "PATH": "/usr/bin:/bin:/usr/sbin",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment |= {"PET_NNODES": str(trainer["numNodes"]), "PET_NODE_RANK": "2"}
    environment |= {"PET_NPROC_PER_NODE": "auto", "PET_MASTER_ADDR": "127.0.0.1"}
    environment |= {"PET_MASTER_PORT": "29400", "GLOO_SOCKET_IFNAME": "none"}
    environment |= {"PYTHON": sys.executable}
    done = subprocess.run(
        [*trainer["command"], "--dry-run", *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    command = done.stdout.splitlines()[-1]
    assert "--nnodes 4 " in command
    assert "is_host=false" in command
    assert command.rstrip().endswith("run.dir=/shared/runs/ppo")
