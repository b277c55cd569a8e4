"""Run untrusted programs isolated from this machine and with limited resources."""

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

SETUP_SECONDS = 10.0
"""Time to create the sandbox, in addition to the program's own."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The resources that one program may use."""

    wall_seconds: float = 4.0
    """Wall-clock time from start to end."""
    cpu_seconds: int = 4
    """CPU time of each process."""
    memory_bytes: int = 512 * MIB
    """Address space of each process."""
    file_bytes: int = 8 * MIB
    """Size of a file, including its output."""
    disk_bytes: int = 32 * MIB
    """Size of /tmp, which is in memory."""
    processes: int = 16
    """Processes and threads at a time."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended."""

    code: int | None
    """Exit code; 124 after a signal; None after a time-out."""
    stdout: str = field(default="")
    """Standard output, up to `Limits.file_bytes`."""
    stderr: str = field(default="")
    """Standard error, up to `Limits.file_bytes`."""


def run_python(
    files: Mapping[str, str],
    *,
    stdin: str = "",
    limits: Limits | None = None,
    mode: SandboxMode = "namespaces",
) -> Outcome:
    """Run `main.py` of `files` in a separate process, with the standard library of this Python.

    It starts in a folder with these files. Of this machine it sees only the files of the system and
    of Python: no network, no processes, no environment variables of the caller.

    Args:
        files: name and text of every file; one must be `main.py`.
        stdin: its standard input.
        limits: the resources it may use; None means the defaults.
        mode: `off` applies the limits without the isolation, for trusted programs.

    Raises:
        RuntimeError: namespaces cannot be created here.
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
    """Return why programs cannot be isolated here; None if they can."""
    try:
        outcome = run_python({"main.py": ""}, limits=Limits(wall_seconds=SETUP_SECONDS))
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
        child.wait(SETUP_SECONDS + settings["wall_seconds"])
    except subprocess.TimeoutExpired:
        return {"problem": f"did not start within {SETUP_SECONDS:g} s"}
    finally:
        # Without isolation, other processes of its session may be left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        with open(answers, "rb") as pipe:  # noqa: PTH123 a descriptor
            text = pipe.read()
    return dict(json.loads(text or b'{"problem": "was killed"}'))


def _text(stream: IO[bytes]) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace")
