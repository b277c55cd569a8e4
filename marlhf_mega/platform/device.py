"""The platform of this process: device, communication backend, dtype, memory, seeds."""

import ctypes
import importlib.util
import logging
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

from marlhf_mega.platform import eager, no_transformer_engine
from marlhf_mega.platform.cpu import shim

logger = logging.getLogger(__name__)

_PROC = Path("/proc/self")
_C_LIBRARY = ctypes.CDLL(None)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Support:
    """Whether something is available, and if not, why, in one clause."""

    available: bool
    reason: str

    def __bool__(self) -> bool:
        return self.available


_NOT_INSTALLED = Support(False, "not installed")


@dataclass(frozen=True)
class Platform:
    """The device of one process, and what depends on it."""

    name: Literal["cuda", "cpu"]
    device: torch.device
    """This rank's device: `cuda:LOCAL_RANK`, or the CPU."""
    backend: Literal["nccl", "gloo"]
    """Communication backend of torch.distributed."""
    default_dtype: torch.dtype
    """Parameter dtype for `precision.dtype=auto`: bfloat16 on CUDA, float32 on the CPU."""

    @property
    def transformer_engine(self) -> Support:
        """Whether Transformer Engine can be used, and if not, why."""
        return _engine() if self.name == "cuda" else Support(False, "there is no CUDA device")

    @property
    def has_broken_engine(self) -> bool:
        """Whether Transformer Engine is installed for this device and cannot be used."""
        engine = self.transformer_engine
        return self.name == "cuda" and not engine and engine is not _NOT_INSTALLED

    @property
    def device_name(self) -> str:
        """The product name of the device, `cpu` on the CPU."""
        return torch.cuda.get_device_name(self.device) if self.name == "cuda" else "cpu"

    @property
    def num_devices(self) -> int:
        """GPUs of this machine; 1 on the CPU, whose cores ranks share."""
        return torch.cuda.device_count() if self.name == "cuda" else 1

    @property
    def total_memory(self) -> int:
        """Bytes of the device, or of this machine."""
        if self.name == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def supports_fp8(self, recipe: str = "tensorwise") -> Support:
        """Return whether an FP8 recipe can be used, and if not, what is missing."""
        if self.name == "cpu":
            return Support(False, "there is no CUDA device")
        return fp8_support(
            torch.cuda.get_device_capability(self.device),
            self.transformer_engine,
            recipe,
            cuda=torch.version.cuda or "0.0",
        )

    def synchronize(self) -> None:
        """Wait for everything queued on the device, for example before reading a clock."""
        if self.name == "cuda":
            torch.cuda.synchronize(self.device)

    def synchronize_computation(self) -> None:
        """Wait for computation on the current stream; communication may still be in flight."""
        if self.name == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def memory_allocated(self) -> int:
        """Return the bytes in use now: by tensors on the GPU, or resident in this process.

        Resident bytes include freed ones until `empty_cache`.
        """
        if self.name == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _resident_bytes("VmRSS")

    def memory_peak(self) -> int:
        """Return the most bytes in use since `reset_memory_peak`."""
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _resident_bytes("VmHWM")

    def reset_memory_peak(self) -> bool:
        """Reset the peak; False if the system does not allow it and the peak is all-time."""
        if self.name == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            (_PROC / "clear_refs").write_text("5")  # 5: reset the peak resident size, proc(5)
        except OSError:
            return False
        return True

    def empty_cache(self) -> None:
        """Return cached free memory to the device, or to the system (with glibc)."""
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
    """Return this process's platform: CUDA if torch can use a device, else the CPU.

    Raises:
        RuntimeError: there are fewer visible GPUs than ranks on this machine.
    """
    if not torch.cuda.is_available():
        return Platform("cpu", torch.device("cpu"), "gloo", torch.float32)
    check_local_rank(local_rank(), torch.cuda.device_count())
    return Platform("cuda", torch.device("cuda", local_rank()), "nccl", torch.bfloat16)


def local_rank() -> int:
    """Return this process's rank among those that torchrun started on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of ranks that torchrun started, 1 without torchrun. No communication."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_local_rank(local_rank: int, num_gpus: int) -> None:
    """Raise if this rank has no GPU of its own on this machine.

    Raises:
        RuntimeError: there are fewer visible GPUs than ranks.
    """
    if local_rank >= num_gpus:
        raise RuntimeError(
            f"LOCAL_RANK={local_rank}: must be below the number of visible GPUs; {num_gpus} are "
            f"visible. Start at most {num_gpus} ranks on this machine."
        )


def fp8_support(capability: tuple[int, int], engine: Support, recipe: str, *, cuda: str) -> Support:
    """Return whether a GPU supports an FP8 recipe of Transformer Engine, and if not, why.

    Args:
        capability: compute capability of the GPU.
        engine: whether it can be used.
        recipe: tensorwise, delayed, blockwise or mxfp8.
        cuda: the CUDA version that torch was built for.
    """
    least = {"blockwise": (9, 0), "mxfp8": (10, 0)}.get(recipe, (8, 9))
    here, needed = (".".join(map(str, x)) for x in (capability, least))
    if capability < least:
        reason = f"the GPU has compute capability {here}, {recipe} FP8 needs at least {needed}"
    elif recipe == "mxfp8" and capability >= (12, 0):
        reason = f"the GPU has compute capability {here}, mxfp8 FP8 needs one below 12.0"
    elif recipe == "blockwise" and tuple(map(int, cuda.split("."))) < (12, 9):
        reason = f"torch was built for CUDA {cuda}, blockwise FP8 needs at least 12.9"
    elif not engine:
        reason = f"Transformer Engine is {engine.reason}"
    else:
        return Support(True, "")
    return Support(False, reason)


def prepare() -> Platform:
    """Prepare this process for importing Megatron, and return its platform.

    Every entry point calls it before anything imports Megatron; repeated calls are harmless. On
    CUDA it selects this rank's device. Without CUDA it installs the CPU shim.

    Raises:
        RuntimeError: psutil is missing, Megatron was imported too early, Transformer Engine is
            installed without CUDA, or there are fewer visible GPUs than ranks.
    """
    # `marlhf doctor` reports missing optional packages; Megatron would at every import.
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
        _forget_products()
        shim.install()
    eager.replace_compiled()
    if not platform.transformer_engine:
        no_transformer_engine.fill_gaps()
        if platform.has_broken_engine and local_rank() == 0:
            logger.warning(
                "Transformer Engine is %s. Without it layers are slower and there is no FP8; "
                "install a version that fits, or uninstall it.",
                platform.transformer_engine.reason,
            )
    return platform


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory for reuse until `empty_cache` returns it to the system.

    Newly mapped memory costs a page fault for every 4 KiB that an operation writes. Blocks above
    the threshold are still returned: glibc would not find them again for aligned allocations.
    """
    if hasattr(_C_LIBRARY, "mallopt"):
        _C_LIBRARY.mallopt(_M_MMAP_THRESHOLD, 1 << 25)
        _C_LIBRARY.mallopt(_M_TRIM_THRESHOLD, 1 << 29)


def _forget_products() -> None:
    """Let oneDNN, and torch in front of it, keep the kernels of 64 products each, not of 1024.

    There is one for every shape. Batches of many widths would keep about 400 KB for each, with
    holes between them in the heap. A step of one width needs about 30.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "64")


def _resident_bytes(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Return this process's resident bytes, now or at the peak, from /proc.

    Without /proc (macOS), both are the all-time peak.
    """
    status = _PROC / "status"
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(x for x in status.read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


@cache
def _engine() -> Support:
    if importlib.util.find_spec("transformer_engine") is None:
        return _NOT_INSTALLED
    try:
        # Without these names Megatron takes the engine for missing and puts mocks in its place.
        from transformer_engine.pytorch.fp8 import (  # noqa: F401
            FP8GlobalStateManager,
            fp8_autocast,
        )
    except (AssertionError, ImportError, OSError, RuntimeError) as error:
        # Installed incompletely, or its CUDA libraries are missing or built for another torch.
        # Megatron would fail on it, but works without it: pretend that it is not installed.
        for module in [name for name in sys.modules if name.startswith("transformer_engine.")]:
            del sys.modules[module]
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]
        first_line = str(error).partition("\n")[0]
        return Support(False, f"installed, but cannot be imported: {first_line}")
    return Support(True, "")
