"""Find slow ranks by the seconds per phase that each spends on its own work."""

import logging
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from marlhf_mega.metrics.timing import PHASES
from marlhf_mega.parallel.collectives import gather_tensors
from marlhf_mega.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

SLOW_FACTOR = 1.5
"""A rank is slow if it takes more than this times as long as its peers ..."""
SLOW_SHARE = 0.1
"""... and the difference is more than this fraction of the step."""
SLOW_STEPS = 5
"""Consecutive slow steps before a warning."""


class Stragglers:
    """Compares the ranks after every step. All ranks create one; rank 0 warns."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._in_a_row: Counter[tuple[int, int]] = Counter()
        """Consecutive steps in which a (rank, phase) was slow."""

    def report(
        self, times: Mapping[str, float], waited: Mapping[str, float], *, step: int
    ) -> dict[str, float]:
        """Gather all ranks' seconds in one small collective. All ranks call it.

        Args:
            times: this rank's `time/PHASE_seconds`, including that of the whole `step`.
            waited: the part of these seconds spent waiting for other ranks, by phase.
            step: number of the step, for the warning.

        Returns:
            `time/PHASE_max_seconds`, `time/PHASE_min_seconds` and `time/PHASE_slowest_rank` of
            every phase, without the waiting; empty on a single rank.
        """
        if self._mesh.world_size == 1:
            return {}
        phases = [phase for phase in PHASES if f"time/{phase}_seconds" in times]
        own = [max(times[f"time/{p}_seconds"] - waited.get(p, 0.0), 0.0) for p in phases]
        row = torch.tensor([float(self._mesh.groups.mp.rank()), *own], dtype=torch.float64)
        table = torch.stack(gather_tensors(row.to(self._mesh.device))).cpu()
        places, seconds = table.split((1, len(phases)), dim=1)
        slow, usual = slow_ranks(seconds, places[:, 0], step_seconds=times["time/step_seconds"])
        found = [(rank, column) for rank, column in slow.nonzero().tolist()]
        self._in_a_row = Counter({key: self._in_a_row[key] + 1 for key in found})
        for rank, column in found:
            if self._in_a_row[rank, column] == SLOW_STEPS and self._mesh.rank == 0:
                logger.warning(
                    "rank %d is slow: in %s it took %.3g s in step %d, ranks with the same part of "
                    "the model %.3g s, likewise in the last %d steps; check its machine",
                    *(rank, phases[column], seconds[rank, column], step, usual[rank, column]),
                    SLOW_STEPS,
                )
        report: dict[str, float] = {}
        for phase, taken in zip(phases, seconds.T, strict=True):
            report[f"time/{phase}_max_seconds"] = taken.max().item()
            report[f"time/{phase}_min_seconds"] = taken.min().item()
            report[f"time/{phase}_slowest_rank"] = float(taken.argmax())
        return report


def slow_ranks(seconds: Tensor, places: Tensor, *, step_seconds: float) -> tuple[Tensor, Tensor]:
    """Find ranks much slower than their peers, which hold the same part of the model.

    Args:
        seconds: [world, phases].
        places: [world], the part of the model that each rank holds; every part has equally many.
        step_seconds: duration of the whole step.

    Returns:
        [world, phases] bool, and the (lower) median of the rank and its peers, in the same shape.
    """
    order = places.argsort(stable=True)
    groups = seconds[order].unflatten(0, (len(places.unique()), -1))
    medians = groups.median(dim=1, keepdim=True).values.expand_as(groups).flatten(0, 1)
    usual = torch.empty_like(seconds).index_copy_(0, order, medians)
    return (seconds > SLOW_FACTOR * usual) & (seconds - usual > SLOW_SHARE * step_seconds), usual
