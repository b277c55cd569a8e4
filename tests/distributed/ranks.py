"""Run rank scripts, tools and jobs on gloo ranks, without torchrun.

The ranks are forked from a process that has imported Megatron: to import it in every rank would
take longer than most of what is tested. Tests of starting and stopping use the real launchers.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

HERE = Path(__file__).parent
JOB = "marlhf_mega"
PATIENCE = 20.0
"""Seconds that the other ranks have to say something after one has failed."""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.distributed.preload"])


def run_ranks(script: str, num_ranks: int, out: Path, *arguments: str, timeout: float = 300) -> Any:
    """Run `tests/distributed/SCRIPT OUT ARGUMENTS...` on `num_ranks` gloo ranks; return its JSON."""
    done = run_forked(HERE / script, out, *arguments, ranks=num_ranks, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(out.read_text())


def run_forked(
    program: str | Path,
    *arguments: object,
    ranks: int = 1,
    timeout: float = 300,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script, or `marlhf` if the program is `JOB`, with this process's import path.

    Args:
        program: path of a script, or name of a package.
        arguments: of the program.
        ranks: number of processes; a single one is started as without torchrun.
        timeout: seconds after which the ranks are killed.
        environment: variables besides those of this process.

    Returns:
        The code of a rank that failed, or 0; what all ranks wrote to stdout and stderr.
    """
    command = [str(program), *map(str, arguments)]
    # As torchrun's agent does, this process holds the store, at a port that the system picks.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "stdout"), Path(folder, "stderr")
        processes = [
            FORKS.Process(target=_rank, args=(command, shared | place, streams))
            for place in _places(ranks, store.port)
        ]
        for process in processes:
            process.start()
        code = _code(processes, timeout)
        out, err = (path.read_text() for path in streams)
    return subprocess.CompletedProcess(command, code, out, err)


def _places(num_ranks: int, port: int) -> list[dict[str, str]]:
    """Return the variables that torchrun would set for every rank."""
    if num_ranks == 1:
        return [{}]
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def _rank(command: list[str], environment: dict[str, str], streams: tuple[Path, Path]) -> None:
    for descriptor, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    if command[0] == JOB:
        runpy.run_module(JOB, run_name="__main__")
    else:
        sys.path.insert(0, str(Path(command[0]).parent))  # as Python does
        runpy.run_path(command[0], run_name="__main__")


def _code(processes: list[ForkServerProcess], timeout: float) -> int:
    """Wait for all processes; after a failure, not for long. Return the code of one that failed."""
    end = time.monotonic() + timeout
    try:
        while alive := [process.sentinel for process in processes if process.exitcode is None]:
            connection.wait(alive, timeout=max(0.0, end - time.monotonic()))
            if any(process.exitcode for process in processes):
                end = min(end, time.monotonic() + PATIENCE)
            if time.monotonic() > end:
                break
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return next((code for code in codes if code), 0 if None not in codes else -1)
