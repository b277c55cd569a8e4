"""What a piece of work asks of the device: launches, waits, time, the kernels that take it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from marlhf_mega.platform import Platform

LAUNCHES = ("LaunchKernel", "GraphLaunch")
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")


@dataclass(frozen=True)
class Counts:
    """Of one piece of work, or the mean of several."""

    operators: float
    """Calls of torch, those that others make included."""
    launches: float
    """Kernels and graphs that the host starts; 0 on a CPU."""
    waits: float
    """Times that the host waits for the device; 0 on a CPU."""
    device_ms: float
    """Time of all kernels; on a CPU that of all operators."""
    kernels: dict[str, float]
    """The longest ones, in milliseconds."""

    def per_repeat(self, other: "Counts", repeats: int) -> dict[str, float]:
        """Return what one of some repeats takes, by how much this is above `other`."""
        names = ("operators", "launches", "waits", "device_ms")
        return {n: round((getattr(self, n) - getattr(other, n)) / repeats, 3) for n in names}


def count(work: Callable[[], object], platform: Platform, *, top: int = 12) -> Counts:
    """Run some work under the profiler."""
    on_gpu = platform.name == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as record:
        work()
        platform.synchronize()
    events = record.key_averages()
    time = {e.key: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in events}
    longest = sorted(time.items(), key=lambda item: -item[1])[:top]
    return Counts(
        operators=sum(e.count for e in events if e.key.startswith("aten::")),
        launches=_calls(events, LAUNCHES),
        # The last one is ours.
        waits=_calls(events, WAITS) - on_gpu,
        device_ms=sum(time.values()) / 1000,
        kernels={name[:80]: round(micros / 1000, 3) for name, micros in longest},
    )


def _calls(events: "torch.autograd.profiler_util.EventList", names: tuple[str, ...]) -> int:
    return sum(e.count for e in events if e.key.startswith("cu") and any(n in e.key for n in names))
