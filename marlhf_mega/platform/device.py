"""The platform of this process: device, communication backend, number type, memory, seeds."""

import ctypes
import importlib.util
import os
import random
import resource
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy
import torch

from marlhf_mega.platform import cpu_shim, without_engine

_PROC = Path("/proc/self")
_C_LIBRARY = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Support:
    """Whether something is available, and in one clause why it is not."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


@dataclass(frozen=True)
class Platform:
    """One process's device and what goes with it."""

    name: Literal["cuda", "cpu"]
    device: torch.device
    """This rank's device: `cuda:LOCAL_RANK`, or the CPU."""
    backend: Literal["nccl", "gloo"]
    """Communication backend of torch.distributed."""
    default_dtype: torch.dtype
    """Parameter type where the config names none: bfloat16 on CUDA, float32 on the CPU."""

    @property
    def has_transformer_engine(self) -> bool:
        """Whether Transformer Engine's torch layers can be used here."""
        return self.name == "cuda" and _engine_imports()

    @property
    def device_name(self) -> str:
        """The device's product name, `cpu` on the CPU."""
        return torch.cuda.get_device_name(self.device) if self.name == "cuda" else "cpu"

    def supports_fp8(self, recipe: str = "tensorwise") -> Support:
        """Say whether an FP8 recipe can be used here, and what is missing if not."""
        if self.name == "cpu":
            return Support(False, "there is no CUDA device")
        return fp8_support(
            torch.cuda.get_device_capability(self.device),
            self.has_transformer_engine,
            recipe,
            cuda=torch.version.cuda or "0.0",
        )

    def synchronize(self) -> None:
        """Wait until the device has finished what was queued, before reading a clock."""
        if self.name == "cuda":
            torch.cuda.synchronize(self.device)

    def synchronize_computation(self) -> None:
        """Wait until everything computed here is done; messages may still be on their way."""
        if self.name == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def memory_allocated(self) -> int:
        """Return bytes in use now: by tensors on the GPU, or resident in this process.

        Resident are bytes that were freed, too, until `empty_cache`.
        """
        if self.name == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _resident_bytes("VmRSS")

    def memory_peak(self) -> int:
        """Return the highest bytes in use since `reset_memory_peak` (CPU: see there)."""
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident_bytes("VmHWM")

    def reset_memory_peak(self) -> bool:
        """Start a new peak; return False where the system forbids it and the peak is all-time."""
        if self.name == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            (_PROC / "clear_refs").write_text("5")  # 5: reset the peak resident size, proc(5)
        except OSError:
            return False
        return True

    def empty_cache(self) -> None:
        """Give cached free memory back to the device, or to the system (where glibc can)."""
        if self.name == "cuda":
            torch.cuda.empty_cache()
        elif hasattr(_C_LIBRARY, "malloc_trim"):
            _C_LIBRARY.malloc_trim(0)

    def seed(self, seed: int) -> None:
        """Seed Python's, numpy's and torch's default generators (torch's on all devices)."""
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)


@cache
def current() -> Platform:
    """Return this process's platform: CUDA where torch can use a device, else the CPU.

    Raises:
        RuntimeError: there are fewer visible GPUs than ranks on this machine.
    """
    if not torch.cuda.is_available():
        return Platform("cpu", torch.device("cpu"), "gloo", torch.float32)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    check_local_rank(local_rank, torch.cuda.device_count())
    return Platform("cuda", torch.device("cuda", local_rank), "nccl", torch.bfloat16)


def check_local_rank(local_rank: int, num_gpus: int) -> None:
    """Refuse a rank that has no GPU of its own on this machine.

    Raises:
        RuntimeError: there are fewer visible GPUs than ranks.
    """
    if local_rank >= num_gpus:
        raise RuntimeError(
            f"LOCAL_RANK={local_rank}: must be below the number of visible GPUs; {num_gpus} are "
            f"visible. Start at most {num_gpus} ranks on this machine."
        )


def fp8_support(
    capability: tuple[int, int], has_transformer_engine: bool, recipe: str, *, cuda: str
) -> Support:
    """Say whether a GPU can use an FP8 recipe through Transformer Engine, by the engine's rules.

    Args:
        capability: compute capability.
        has_transformer_engine: whether it can be imported.
        recipe: tensorwise, delayed, blockwise or mxfp8.
        cuda: the CUDA version torch was built for.
    """
    least = {"blockwise": (9, 0), "mxfp8": (10, 0)}.get(recipe, (8, 9))
    here, needed = (".".join(map(str, x)) for x in (capability, least))
    if capability < least:
        reason = f"the GPU has compute capability {here}, {recipe} FP8 needs at least {needed}"
    elif recipe == "mxfp8" and capability >= (12, 0):
        reason = f"the GPU has compute capability {here}, mxfp8 FP8 needs one below 12.0"
    elif recipe == "blockwise" and tuple(map(int, cuda.split("."))) < (12, 9):
        reason = f"torch was built for CUDA {cuda}, blockwise FP8 needs at least 12.9"
    elif not has_transformer_engine:
        reason = "transformer_engine cannot be imported"
    else:
        return Support(True, "")
    return Support(False, reason)


def prepare() -> Platform:
    """Make this process ready to import Megatron, and return its platform.

    Every entry point calls it once, before anything imports Megatron; more calls do no harm.
    On CUDA it selects this rank's device. Without CUDA it installs the CPU shim.

    Raises:
        RuntimeError: psutil is missing, Megatron was imported too early, Transformer Engine is
            installed where there is no CUDA, or there are fewer visible GPUs than ranks.
    """
    # What is missing beside Megatron is said by `marlhf doctor`, not at every import.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    if importlib.util.find_spec("psutil") is None:
        raise RuntimeError(
            "platform.python=psutil: must be installed, because Megatron's checkpoint writers die "
            "without it and the save then hangs; it is not. Run `pip install psutil`."
        )
    platform = current()
    if platform.name == "cuda":
        torch.cuda.set_device(platform.device)
    else:
        _keep_freed_memory()
        cpu_shim.install()
    if not platform.has_transformer_engine:
        without_engine.install()
    return platform


def _keep_freed_memory() -> None:
    """Let glibc reuse what tensors free instead of giving it back; `empty_cache` does that.

    Memory that is mapped anew costs a page fault for every 4 KiB that an operation writes. Larger
    blocks than these go back as before: glibc does not find a freed one again when it has to align.
    """
    if hasattr(_C_LIBRARY, "mallopt"):
        _C_LIBRARY.mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        _C_LIBRARY.mallopt(_M_TRIM_THRESHOLD, 1 << 29)


def _resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Return this process's resident bytes, now or at their peak, from the kernel's table.

    Where there is no such table (macOS) both are the all-time peak.
    """
    status = _PROC / "status"
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(x for x in status.read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


@cache
def _engine_imports() -> bool:
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (AssertionError, ImportError, OSError, RuntimeError):
        # Installed, but in parts only, or its CUDA libraries are not found or were built for
        # another torch. Megatron would fail on it, and does without one that is not there.
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
        return False
    return True
