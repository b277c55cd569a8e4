"""Launch scripts run with programs of a cluster that only record how they were called."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "launch"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs that comes first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


@pytest.fixture
def program(programs: Path) -> Callable[[str, str], Path]:
    """Write an executable shell script of this name."""

    def write(name: str, body: str) -> Path:
        path = programs / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
        return path

    return write


@pytest.fixture
def gpus(program):
    """Pretend that this machine has GPUs."""

    def fake(count: int, capability: str) -> None:
        program(
            "nvidia-smi",
            f"""case "$*" in
            *--list-gpus*) for i in $(seq {count}); do echo "GPU $i: fake"; done ;;
            *compute_cap*) for i in $(seq {count}); do echo {capability}; done ;;
            *) exit 1 ;;
            esac""",
        )

    return fake


@pytest.fixture
def launch(programs: Path, tmp_path: Path) -> Run:
    """Run a file of launch/ with nothing but what the test sets in its environment."""

    def run(script: str, *arguments: str, timeout: float = 60, **environment: str):
        fixed = {"HOME": str(tmp_path), "PYTHON": sys.executable, "LC_ALL": "C"}
        if not (programs / "nvidia-smi").exists():
            fixed["CUDA_VISIBLE_DEVICES"] = ""
        path = f"{programs}{os.pathsep}/usr/sbin:/usr/bin:/sbin:/bin"
        return subprocess.run(
            ["bash", str(ROOT / "launch" / script), *arguments],
            env={**fixed, "PATH": path, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def same_as_golden(tmp_path: Path) -> Callable[[str, str], None]:
    """Compare with a file of tests/golden/launch; MARLHF_WRITE_GOLDEN=1 writes it anew."""

    def compare(text: str, name: str) -> None:
        for real, shown in (
            (sys.executable, "PYTHON"),
            (str(tmp_path), "HERE"),
            (str(ROOT), "ROOT"),
        ):
            text = text.replace(real, shown)
        path = GOLDEN / name
        if os.environ.get("MARLHF_WRITE_GOLDEN") == "1":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert text == path.read_text()

    return compare
