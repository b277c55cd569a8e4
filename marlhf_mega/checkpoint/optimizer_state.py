"""Step counters and moments of the optimizers inside a train state.

Where Transformer Engine is missing Megatron uses torch's AdamW, which counts steps in a tensor of
each parameter; Transformer Engine's Adam counts in the parameter group. Megatron saves and restores
neither well (see `marlhf_mega.platform.without_engine`), so checkpoints hold the count themselves.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from marlhf_mega.models.train_state import TrainState


def distributed_optimizers(role: TrainState) -> list[DistributedOptimizer]:
    """Return this rank's optimizers that hold parameters: one, or two with experts."""
    parts = getattr(role.optimizer, "chained_optimizers", [role.optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def fill_empty(role: TrainState) -> None:
    """Give parameters the state of their first step; Megatron saves and loads what is there."""
    for inner in _inner_optimizers(role):
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                if _counts_per_parameter(inner):
                    state["step"] = torch.zeros(())
                inner.state[parameter] = state


def num_steps(role: TrainState) -> int:
    """Return the optimizer steps taken; 0 on a rank that holds no parameter's state."""
    found = [int(holder["step"]) for holder in _counters(role) if "step" in holder]
    assert len(set(found)) <= 1, found
    return found[0] if found else 0


def set_num_steps(role: TrainState, count: int) -> None:
    """Set all counters, each parameter's of its own: AdamW adds 1 to each of them in place."""
    for holder in _counters(role):
        step = holder.get("step")  # a group has none before its first step
        holder["step"] = torch.full_like(step, count) if torch.is_tensor(step) else count


def _counters(role: TrainState) -> list[dict[str, Any]]:
    """Return the dictionaries that hold a `step`, or will; a group without parameters may not."""
    found: list[dict[str, Any]] = []
    for inner in _inner_optimizers(role):
        if _counts_per_parameter(inner):
            found += inner.state.values()
        else:
            found += [group for group in inner.param_groups if group["params"]]
    return found


def _counts_per_parameter(inner: torch.optim.Optimizer) -> bool:
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)


def _inner_optimizers(role: TrainState) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in distributed_optimizers(role)]
