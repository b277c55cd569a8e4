"""Peak memory of each phase of a step."""

from collections.abc import Iterator
from contextlib import contextmanager

from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.metrics.timing import PHASES
from marlhf_mega.platform.device import Platform

PHASE_PEAKS = tuple(f"perf/{phase}_peak_memory_gib" for phase in PHASES)
"""Metrics: the highest of all ranks."""


class PhasePeaks:
    """Watches the memory of a rank, phase by phase."""

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._peaks: dict[str, int] = {}
        self._highest = 0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Record the peak of a `with` block, where the system can tell it from an earlier one."""
        self._highest = max(self._highest, self._platform.memory_peak())
        is_own = self._platform.reset_memory_peak()
        yield
        if is_own:
            peak = self._platform.memory_peak()
            self._peaks[phase] = max(peak, self._peaks.get(phase, 0))

    def drain(self, sums: MetricSums) -> None:
        """Add the peaks since the last call to the metrics `PHASE_PEAKS`."""
        for phase, peak in self._peaks.items():
            sums.add_maximum(f"perf/{phase}_peak_memory_gib", peak / 2**30)
        self._peaks = {}

    def highest_gib(self) -> float:
        """Return the peak of the run so far, in GiB."""
        return max(self._highest, self._platform.memory_peak()) / 2**30
