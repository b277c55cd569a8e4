"""Peaks of phases, on this process's own memory."""

import gc

import pytest
import torch

from marlhf_mega.metrics.memory import PHASE_PEAKS, PhasePeaks
from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.platform import current

MEGABYTE = 2**20


def test_each_phase_has_its_own_peak_and_the_highest_stays():
    platform = current()
    # Before the reset: the peak starts at what is in use, what earlier tests left behind included.
    gc.collect()
    platform.empty_cache()
    if not platform.reset_memory_peak():
        pytest.skip("this system does not let a process reset its peak")
    peaks = PhasePeaks(platform)
    with peaks("rollout"):
        # Written to, so that it is really there.
        large = torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    del large
    platform.empty_cache()
    with peaks("update"):
        pass
    sums = MetricSums(maximum=PHASE_PEAKS)
    peaks.drain(sums)
    found = sums.unpack(*sums.pack())
    names = ("perf/rollout_peak_memory_gib", "perf/update_peak_memory_gib")
    assert set(found) == set(names)
    rollout, update = (found[name] * 1024 for name in names)
    assert rollout - update == pytest.approx(64, abs=4)
    assert peaks.highest_gib() * 1024 == pytest.approx(rollout, abs=4)
    again = MetricSums(maximum=PHASE_PEAKS)
    peaks.drain(again)
    assert again.unpack(*again.pack()) == {}
