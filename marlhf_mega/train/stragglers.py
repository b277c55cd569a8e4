"""Which rank is slow: seconds per phase that a rank spends on work of its own, compared."""

import logging
from collections import Counter
from collections.abc import Mapping
from statistics import median

import torch

from marlhf_mega.parallel.collectives import gather_over_world
from marlhf_mega.parallel.mesh import Mesh

logger = logging.getLogger(__name__)

PHASES = ("rollout", "experience", "update")
SLOW_FACTOR = 1.5
"""A rank is slow that takes this many times as long as its peers, ..."""
SLOW_SHARE = 0.1
"""... if that costs at least this share of the step, ..."""
SLOW_STEPS = 5
"""... and is worth a warning after so many steps in a row."""


class Stragglers:
    """Compares the ranks after every step. All ranks hold one; rank 0 warns."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._in_a_row: Counter[tuple[int, str]] = Counter()

    def report(
        self, times: Mapping[str, float], waited: Mapping[str, float], *, step: int
    ) -> dict[str, float]:
        """Gather all ranks' seconds in one small collective. All ranks call it.

        Args:
            times: of this rank, `time/PHASE_seconds`, with those of the whole `step`.
            waited: seconds of them, by phase, in which it waited for other ranks.
            step: number of the step, for the warning.

        Returns:
            `time/PHASE_max_seconds`, `time/PHASE_min_seconds` and `time/PHASE_slowest_rank` of
            every phase there is, without the waiting; nothing for a rank alone.
        """
        if self._mesh.world_size == 1:
            return {}
        phases = [phase for phase in PHASES if f"time/{phase}_seconds" in times]
        own = [max(times[f"time/{p}_seconds"] - waited.get(p, 0.0), 0.0) for p in phases]
        row = torch.tensor([float(self._mesh.groups.mp.rank()), *own], dtype=torch.float64)
        places, *columns = gather_over_world(row, self._mesh).T.tolist()
        seconds = dict(zip(phases, columns, strict=True))
        if self._mesh.rank == 0:
            self._warn(seconds, places, step_seconds=times["time/step_seconds"], step=step)
        found: dict[str, float] = {}
        for phase, column in seconds.items():
            found[f"time/{phase}_max_seconds"] = max(column)
            found[f"time/{phase}_min_seconds"] = min(column)
            found[f"time/{phase}_slowest_rank"] = float(column.index(max(column)))
        return found

    def _warn(
        self,
        columns: Mapping[str, list[float]],
        places: list[float],
        *,
        step_seconds: float,
        step: int,
    ) -> None:
        now = {
            (rank, phase): usual
            for phase, column in columns.items()
            for rank, usual in slow_ranks(column, places, step_seconds=step_seconds).items()
        }
        self._in_a_row = Counter({key: self._in_a_row[key] + 1 for key in now})
        for (rank, phase), usual in now.items():
            if self._in_a_row[rank, phase] == SLOW_STEPS:
                logger.warning(
                    "rank %d is slow: in %s it took %.3g s in step %d, ranks with the same part of "
                    "the model %.3g s, and so in the last %d steps; look at its machine",
                    *(rank, phase, columns[phase][rank], step, usual, SLOW_STEPS),
                )


def slow_ranks(
    seconds: list[float], places: list[float], *, step_seconds: float
) -> dict[int, float]:
    """Find ranks much slower than their peers, which hold the same part of the model.

    Args:
        seconds: of each rank in one phase.
        places: which part of the model each rank holds.
        step_seconds: of the whole step.

    Returns:
        By slow rank, the median of its peers' seconds.
    """
    found = {}
    for rank, (own, place) in enumerate(zip(seconds, places, strict=True)):
        peers = [s for r, s in enumerate(seconds) if places[r] == place and r != rank]
        if not peers:
            continue
        usual = median(peers)
        if own > SLOW_FACTOR * usual and own - usual > SLOW_SHARE * step_seconds:
            found[rank] = usual
    return found
