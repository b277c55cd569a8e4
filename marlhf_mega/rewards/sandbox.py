"""Untrusted programs, run where they can read, reach and keep nothing, and only so much of it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

CHILD = Path(__file__).with_name("sandbox_child.py")

MIB = 1 << 20

SandboxMode = Literal["namespaces", "off"]

START_SECONDS = 10.0
"""Time for making the sandbox, on top of the program's own."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 4.0
    """From its start to its end."""
    cpu_seconds: int = 4
    """Processor time of each of its processes."""
    memory_bytes: int = 512 * MIB
    """Address space of each of its processes."""
    file_bytes: int = 8 * MIB
    """Largest file, its output included."""
    disk_bytes: int = 32 * MIB
    """All of /tmp, which is in memory."""
    processes: int = 16
    """Processes and threads at a time."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended."""

    code: int | None
    """Exit code; 124 after a signal; none: the clock ran out."""
    stdout: str = field(default="")
    """What it printed, up to `Limits.file_bytes`."""
    stderr: str = field(default="")
    """What it printed as errors, up to `Limits.file_bytes`."""


def run_python(
    files: Mapping[str, str],
    *,
    stdin: str = "",
    limits: Limits | None = None,
    mode: SandboxMode = "namespaces",
) -> Outcome:
    """Run `main.py` of `files` with this Python's standard library, in a process of its own.

    It starts in a folder with these files and sees no other of this machine but the system's and
    Python's, no network, no process, no environment variable of the caller.

    Args:
        files: name and text of each file; one is `main.py`.
        stdin: what it can read.
        limits: what it may use; none: the defaults.
        mode: `off` keeps the limits but not the isolation: for programs that are trusted.

    Raises:
        RuntimeError: namespaces cannot be made here.
    """
    base = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder, contextlib.ExitStack() as stack:
        root = Path(folder, "root")
        root.mkdir()
        settings = asdict(limits or Limits()) | {
            "isolate": mode == "namespaces",
            "root": str(root),
            "folders": [sys.base_prefix, sys.base_exec_prefix],
            "files": dict(files),
            "command": [str(base), "-I", "-B", "main.py"],
        }
        Path(folder, "settings.json").write_text(json.dumps(settings))
        given, out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        given.write(stdin.encode(errors="replace"))
        given.seek(0)
        answer = _run_child([given, out, err], Path(folder, "settings.json"), base, settings)
        if "problem" in answer:
            raise RuntimeError(f"sandbox: {answer['problem']}")
        return Outcome(code=answer.get("code"), stdout=_text(out), stderr=_text(err))


@cache
def sandbox_problem() -> str | None:
    """Say why programs cannot be isolated here; none: they can."""
    try:
        outcome = run_python({"main.py": ""}, limits=Limits(wall_seconds=START_SECONDS))
    except RuntimeError as error:
        return str(error)
    return (
        None if outcome.code == 0 else f"sandbox: an empty program failed: {outcome.stderr[-200:]}"
    )


def _run_child(
    streams: list[IO[bytes]], settings_path: Path, python: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    answers, answers_end = os.pipe()
    try:
        child = subprocess.Popen(
            [str(python), "-I", "-S", str(CHILD), str(settings_path), str(answers_end)],
            stdin=streams[0],
            stdout=streams[1],
            stderr=streams[2],
            env={},
            pass_fds=(answers_end,),
            start_new_session=True,
        )
    finally:
        os.close(answers_end)
    try:
        child.wait(START_SECONDS + settings["wall_seconds"])
    except subprocess.TimeoutExpired:
        return {"problem": f"did not start within {START_SECONDS:g} s"}
    finally:
        # What is left of its session, if the isolation is off.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        with open(answers, "rb") as pipe:  # noqa: PTH123 a descriptor
            text = pipe.read()
    return dict(json.loads(text or b'{"problem": "was killed"}'))


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")
