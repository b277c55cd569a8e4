"""`marlhf doctor`: what the machines have, and whether ranks, network, disk and clocks agree."""

import logging
import platform as machine
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.hardware import ParallelConfig
from marlhf_mega.rewards.sandbox import sandbox_problem

if TYPE_CHECKING:  # its import can fail, and the doctor reports that
    from marlhf_mega.parallel.mesh import Mesh
    from marlhf_mega.platform import Platform

Status = Literal["ok", "note", "FAIL"]

PACKAGES = ("torch", "megatron-core", "transformers", "safetensors")

JOIN_SECONDS = 120.0
"""How long the ranks wait for each other."""

MAX_SKEW_SECONDS = 2.0
"""Between the clocks of two machines; beyond it, logs of two machines are hard to compare."""

LOW_DISK_BYTES = 20 << 30
"""About the size of a checkpoint of a 1B model with optimizer states."""

LOW_SHARED_MEMORY_BYTES = 64 << 20
"""What NCCL needs between the GPUs of a machine."""

BANDWIDTH_ELEMENTS = 4 << 20
"""float32 values in the timed all-reduce: 16 MiB."""

SHARED_FILE_SECONDS = 10.0
"""How long a network file system can take to show a new file on another machine."""


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    check: str
    status: Status
    detail: str
    must_agree: bool = False
    """Whether different details on two ranks are a failure."""


def examine(config: Config) -> list[Finding]:
    """Examine this machine and, under torchrun, all machines. All ranks call it.

    Args:
        config: its `run.dir` names the disk to examine, its model the kernels.

    Returns:
        The same findings on all ranks, or only this rank's if the ranks cannot reach each other.
    """
    own = list(_local_findings(config.run.dir))
    try:
        from marlhf_mega.parallel.collectives import gather_objects
        from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh

        mesh = create_mesh(ParallelConfig(), timeout_seconds=JOIN_SECONDS)
        together = [_kernels(config, mesh), *_joint_findings(config.run.dir, mesh)]
        findings = _merge(gather_objects([*own, *together]))
        destroy_mesh()
    except RuntimeError as error:  # including torch's network errors
        logging.getLogger(__name__).debug("ranks", exc_info=error)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [*own, Finding("ranks", "FAIL", reason)]
    return findings


def table(findings: Sequence[Finding]) -> str:
    """Return the findings as aligned lines."""
    width = max(len(finding.check) for finding in findings)
    return "".join(f"{f.check:<{width}}  {f.status:<4}  {f.detail}\n" for f in findings)


def _local_findings(run_dir: Path) -> Iterator[Finding]:
    yield Finding("python", "ok", machine.python_version(), must_agree=True)
    for package in PACKAGES:
        try:
            yield Finding(package, "ok", version(package), must_agree=True)
        except PackageNotFoundError:
            yield Finding(package, "FAIL", "not installed", must_agree=True)
    yield from _devices()
    yield _apex()
    problem = sandbox_problem()
    yield Finding(
        "sandbox",
        "note" if problem else "ok",
        f"{problem}; rewards that run code are refused" if problem else "namespaces can be made",
    )
    yield _free("disk", run_dir, LOW_DISK_BYTES)
    yield _free("shared memory", Path("/dev/shm"), LOW_SHARED_MEMORY_BYTES)


def _devices() -> Iterator[Finding]:
    from marlhf_mega import platform

    try:
        here = platform.current()
    except RuntimeError as error:
        yield Finding("device", "FAIL", str(error))
        return
    if here.name == "cpu":
        yield Finding("device", "note", "no CUDA device: float32 on the CPU", must_agree=True)
    else:
        yield Finding("device", "ok", here.device_name, must_agree=True)
    yield _engine(here)
    yield _vllm(here)
    fp8 = here.supports_fp8()
    yield Finding("fp8", "ok" if fp8 else "note", "available" if fp8 else fp8.reason)


def _engine(here: "Platform") -> Finding:
    """Judge Transformer Engine, also by the versions that Megatron-Core declares."""
    check, engine = "transformer engine", here.transformer_engine
    if not engine:
        status: Status = "FAIL" if here.has_broken_engine else "note"
        return Finding(check, status, engine.reason, must_agree=True)
    installed = version("transformer-engine")
    needed = declared_engine_versions()
    if not needed.contains(installed, prereleases=True):
        return Finding(check, "FAIL", f"{installed}; Megatron-Core needs {needed}", must_agree=True)
    return Finding(check, "ok", installed, must_agree=True)


def declared_engine_versions() -> SpecifierSet:
    """Return the versions of Transformer Engine that the installed Megatron-Core declares."""
    declared = [Requirement(line) for line in requires("megatron-core") or ()]
    found = [r.specifier for r in declared if canonicalize_name(r.name) == "transformer-engine"]
    return max(found, key=len, default=SpecifierSet())


def _vllm(here: "Platform") -> Finding:
    """Judge vLLM, which only rollout.engine=vllm needs."""
    from marlhf_mega.platform import vllm

    support, installed = vllm.support(), vllm.version()
    if installed is None:
        return Finding("vllm", "ok", "not installed, and not needed", must_agree=True)
    if not support:
        return Finding("vllm", "note", support.reason, must_agree=True)
    sizes = "" if here.name == "cuda" else f"; heads of {', '.join(map(str, vllm.CPU_HEAD_SIZES))}"
    return Finding("vllm", "ok", f"{installed}{sizes}", must_agree=True)


def _apex() -> Finding:
    """Distinguish NVIDIA's apex, which is optional, from a web toolkit of the same name on PyPI."""
    if find_spec("apex") is None:
        return Finding("apex", "ok", "not installed, and not needed", must_agree=True)
    if find_spec("amp_C") is not None:
        return Finding("apex", "ok", "NVIDIA's, with its CUDA kernels", must_agree=True)
    if find_spec("apex.multi_tensor_apply") is not None:
        return Finding("apex", "note", "NVIDIA's, without CUDA kernels: not used", must_agree=True)
    return Finding(
        "apex", "FAIL", "not NVIDIA's but a web toolkit; run `pip uninstall apex`", must_agree=True
    )


def _kernels(config: Config, mesh: "Mesh") -> Finding:
    """Say what is fused in the layers of the configured model, and by which library."""
    from marlhf_mega.models.kernels import kernels_in_use

    found = kernels_in_use(config.model, config.precision, mesh)
    detail = "; ".join(f"{operation}: {by}" for operation, by in found.items())
    return Finding("kernels", "ok", detail, must_agree=True)


def _free(check: str, folder: Path, low: int) -> Finding:
    folder = _existing(folder)
    free = shutil.disk_usage(folder).free
    return Finding(
        check, "ok" if free >= low else "note", f"{free / 2**30:.0f} GiB free in {folder}"
    )


def _existing(folder: Path) -> Path:
    """Return the nearest folder that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _joint_findings(run_dir: Path, mesh: "Mesh") -> Iterator[Finding]:
    yield Finding("ranks", "ok", mesh.describe())
    yield _reachability(mesh)
    yield _clocks(mesh)
    yield _shared_folder(run_dir, mesh)


def _reachability(mesh: "Mesh") -> Finding:
    """Check a sum over all ranks, and time small and large sums."""
    from marlhf_mega.parallel.collectives import sum_over_world

    total = sum_over_world(torch.tensor([float(mesh.rank)], device=mesh.device)).item()
    expected = mesh.world_size * (mesh.world_size - 1) / 2
    if total != expected:
        return Finding("network", "FAIL", f"the sum of the ranks is {total:g}, not {expected:g}")
    if mesh.world_size == 1:
        return Finding("network", "note", "only one rank: start doctor by launch/torchrun.sh")
    small = torch.ones(1, device=mesh.device)
    large = torch.ones(BANDWIDTH_ELEMENTS, device=mesh.device)
    sum_over_world(large)

    def seconds(value: torch.Tensor) -> float:
        mesh.platform.synchronize()
        start = time.perf_counter()
        sum_over_world(value)
        mesh.platform.synchronize()
        return time.perf_counter() - start

    latency = min(seconds(small) for _ in range(5))
    slowest = min(seconds(large) for _ in range(3))
    rate = large.nbytes / slowest / 1e9
    detail = f"{mesh.platform.backend}: sum of 16 MiB at {rate:.2f} GB/s, of 4 B in"
    return Finding("network", "ok", f"{detail} {latency * 1e3:.2f} ms, seen from rank {mesh.rank}")


def _clocks(mesh: "Mesh") -> Finding:
    """Compare all clocks right after a barrier; the smallest of three differences counts."""
    from marlhf_mega.parallel.collectives import barrier, gather_objects

    spreads = []
    for _ in range(3):
        barrier()
        times = gather_objects(time.time())
        spreads.append(max(times) - min(times))
    skew = min(spreads)
    status: Status = "ok" if skew <= MAX_SKEW_SECONDS else "FAIL"
    return Finding("clocks", status, f"at most {skew:.3f} s apart", must_agree=True)


def _shared_folder(run_dir: Path, mesh: "Mesh") -> Finding:
    """Check that every rank sees a file that rank 0 writes in the run's folder."""
    from marlhf_mega.parallel.collectives import barrier, broadcast_object

    own = _existing(run_dir) / f".doctor-{uuid.uuid4().hex}"
    path = Path(broadcast_object(str(own)))
    problem = broadcast_object(_outcome(lambda: path.write_text("x")) if mesh.rank == 0 else "")
    if problem:
        return Finding("shared folder", "FAIL", f"cannot be written: {problem}", must_agree=True)
    deadline = time.monotonic() + SHARED_FILE_SECONDS
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    barrier()
    if mesh.rank == 0:
        path.unlink()
    if seen:
        return Finding("shared folder", "ok", f"every rank sees {path.parent}")
    return Finding(
        "shared folder", "FAIL", f"{path.parent} is another folder on {socket.gethostname()}"
    )


def _outcome(action: Callable[[], object]) -> str:
    try:
        action()
    except OSError as error:
        return str(error)
    return ""


def _merge(of_ranks: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Make one row per check: the worst status, and which ranks report what if they differ."""
    merged = []
    for rows in zip(*of_ranks, strict=True):
        worst = max(rows, key=lambda row: ("ok", "note", "FAIL").index(row.status))
        details: dict[str, list[int]] = {}
        for rank, row in enumerate(rows):
            details.setdefault(row.detail, []).append(rank)
        if worst.must_agree and len(details) > 1:
            parts = [f"ranks {_ranges(ranks)}: {detail}" for detail, ranks in details.items()]
            merged.append(replace(worst, status="FAIL", detail="; ".join(parts)))
        elif worst.status != "ok" and len(of_ranks) > 1:
            ranks = [rank for rank, row in enumerate(rows) if row.status == worst.status]
            merged.append(replace(worst, detail=f"ranks {_ranges(ranks)}: {worst.detail}"))
        else:
            merged.append(worst)
    return merged


def _ranges(ranks: Sequence[int]) -> str:
    """Abbreviate sorted numbers: 0-3, 5."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
