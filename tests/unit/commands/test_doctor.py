"""`marlhf doctor`: what it finds on one rank and on several, well and ill."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from marlhf_mega.commands.doctor import (
    Finding,
    _apex,
    _merge,
    _vllm,
    declared_engine_versions,
    table,
)
from marlhf_mega.platform import vllm

ROOT = Path(__file__).parents[3]


def doctor(*arguments, launcher=(), **environment):
    command = [*launcher, "doctor", *arguments] if launcher else None
    command = command or [sys.executable, "-m", "marlhf_mega", "doctor", *arguments]
    done = subprocess.run(
        command,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    rows = {line[:20].strip(): line[20:] for line in done.stdout.splitlines()}
    return done, rows


def test_several_ranks_are_one_table_and_leave_no_file(tmp_path):
    launcher = ["bash", str(ROOT / "launch" / "torchrun.sh"), "--ranks-per-node", "2"]
    done, rows = doctor(f"run.dir={tmp_path / 'run'}", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert rows["ranks"].startswith("ok    2 ranks: ")
    assert rows["network"].startswith("ok    gloo: sum of 16 MiB at ")
    assert rows["shared folder"].startswith(f"ok    every rank sees {tmp_path}")
    assert rows["clocks"].startswith("ok    at most 0.")
    assert rows["torch"].startswith("ok")
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_cannot_be_reached_is_a_failure():
    program = (
        "import sys, marlhf_mega.commands.doctor as d\n"
        "d.JOIN_SECONDS = 3.0\n"
        "from marlhf_mega.cli import main\n"
        "sys.exit(main(['doctor']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ
        | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("ranks ")
    assert "FAIL" in last
    assert "Traceback" not in done.stderr


def test_one_rank_names_what_it_could_not_test_and_what_failed():
    done, rows = doctor("run.dir=/proc/run")
    assert done.returncode == 1
    assert rows["kernels"].endswith("activation: platform/eager.py; attention: torch")
    assert rows["network"] == "note  only one rank: start doctor by launch/torchrun.sh"
    assert rows["shared folder"].startswith("FAIL  cannot be written: ")


def make_package(folder, name, *modules):
    (folder / name).mkdir(parents=True)
    for module in ("__init__", *modules):
        (folder / name / f"{module}.py").write_text("")


@pytest.mark.parametrize(
    ("installed", "status", "detail"),
    [
        (None, "ok", "not installed, and not needed"),
        ("0.31.0", "note", "version 0.31.0 is installed, >=0.32,<0.33 is supported"),
        ("0.32.0", "ok", "0.32.0; heads of 32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512"),
    ],
)
def test_vllm_is_judged_by_its_version(monkeypatch, installed, status, detail):
    monkeypatch.setattr(vllm, "version", lambda: installed)
    here = SimpleNamespace(name="cpu")
    assert _vllm(here) == Finding("vllm", status, detail, must_agree=True)


@pytest.mark.parametrize(
    ("modules", "kernels", "status", "detail"),
    [
        (["lib"], False, "FAIL", "not NVIDIA's but a web toolkit; run `pip uninstall apex`"),
        (["multi_tensor_apply"], False, "note", "NVIDIA's, without CUDA kernels: not used"),
        (["multi_tensor_apply"], True, "ok", "NVIDIA's, with its CUDA kernels"),
    ],
)
def test_apex_is_told_from_its_namesake(tmp_path, monkeypatch, modules, kernels, status, detail):
    make_package(tmp_path, "apex", *modules)
    if kernels:
        (tmp_path / "amp_C.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert _apex() == Finding("apex", status, detail, must_agree=True)
    monkeypatch.delitem(sys.modules, "apex", raising=False)


def test_the_gpu_extra_asks_for_the_engines_that_megatron_declares():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = map(Requirement, project["optional-dependencies"]["gpu"])
    (asked,) = [r.specifier for r in extra if r.marker is None or r.marker.evaluate()]
    # Megatron-Core 0.19 declares no range.
    assert declared_engine_versions() in (asked, SpecifierSet())


def test_ranks_that_differ_where_they_must_agree_fail():
    rows = [[Finding("torch", "ok", v, must_agree=True)] for v in ("2.13", "2.13", "2.11", "2.13")]
    detail = "ranks 0-1, 3: 2.13; ranks 2: 2.11"
    assert _merge(rows) == [Finding("torch", "FAIL", detail, must_agree=True)]


def test_the_worst_rank_speaks_for_all():
    rows = [[Finding("disk", "ok", "90 GiB")], [Finding("disk", "note", "3 GiB")]]
    assert _merge(rows) == [Finding("disk", "note", "ranks 1: 3 GiB")]


def test_the_table_is_aligned():
    assert table([Finding("a", "ok", "x"), Finding("long", "FAIL", "y")]) == (
        "a     ok    x\nlong  FAIL  y\n"
    )
