"""Checkpoints: size, time to write, best interval."""

import math
from dataclasses import dataclass

from marlhf_mega.plan.parameters import whole_model_size
from marlhf_mega.plan.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Costs of saving and of failures. All rates are assumptions."""

    mtbf_hours: float = 50_000.0
    """Mean time between failures of one GPU and its share of the machine. A run on 16 384 GPUs had
    an interruption every 3 hours (Llama 3, arXiv 2407.21783), which is 50 000 hours per GPU."""
    write_bytes: float = 2e9
    """Bytes per second that one machine writes."""
    restart_seconds: float = 300.0
    """From a failure to the first new step, reading the checkpoint included."""


@dataclass(frozen=True, kw_only=True)
class CheckpointPlan:
    """Size, cost and best interval of checkpoints (Young 1974; Daly 2006, equation 37)."""

    num_bytes: int
    write_seconds: float
    world_mtbf_seconds: float
    interval_seconds: float
    """Time between saves that loses least: sqrt(2 * write * MTBF) - write."""
    interval_steps: int | None
    """The same in steps; None if the time of a step is not known."""
    lost_fraction: float
    """Share of time spent on saving, on repeating lost steps and on restarting."""

    @property
    def failures_per_week(self) -> float:
        """Expected number of interruptions."""
        return 7 * 86400 / self.world_mtbf_seconds


def checkpoint_plan(
    work: Workload, *, nodes: int, element: int, step_seconds: float | None, rates: Reliability
) -> CheckpointPlan:
    """Size the checkpoints of a job: weights that learn, their float32 masters and moments.

    Of a mask policy there are only weights.

    Args:
        work: the job.
        nodes: machines with ranks that train; they write in parallel.
        element: bytes of a weight.
        step_seconds: of one step, if known.
        rates: failure and write rates.
    """
    sizes = [whole_model_size(r.model, r.head, only_learning=True) for r in work.roles if r.learns]
    masks = [whole_model_size(r.model, r.head) for r in work.roles if r.name == "mask"]
    num_bytes = sum(sizes) * (element + 12) + sum(masks) * element
    write = num_bytes / (rates.write_bytes * nodes)
    mtbf = rates.mtbf_hours * 3600 / work.world_size
    interval = max(math.sqrt(2 * write * mtbf) - write, write)
    redo = interval / 2 + rates.restart_seconds
    return CheckpointPlan(
        num_bytes=num_bytes,
        write_seconds=write,
        world_mtbf_seconds=mtbf,
        interval_seconds=interval,
        interval_steps=max(1, round(interval / step_seconds)) if step_seconds else None,
        lost_fraction=min(1.0, write / (interval + write) + redo / mtbf),
    )
