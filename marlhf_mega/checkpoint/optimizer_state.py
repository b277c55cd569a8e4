"""Step counters and moments of the optimizers in a train state.

Without Transformer Engine, Megatron uses torch's AdamW, which counts steps in a tensor per
parameter; Transformer Engine's Adam counts them per parameter group. Checkpoints keep one counter
for both.
"""

from typing import Any

import torch

from marlhf_mega.models.train_state import TrainState


def fill_empty(role: TrainState) -> None:
    """Create the initial state of parameters without one; Megatron saves and loads what exists."""
    for inner in _inner_optimizers(role):
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                state = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                if _counts_per_parameter(inner):
                    state["step"] = torch.zeros(())
                inner.state[parameter] = state


def steps_taken(role: TrainState) -> int:
    """Return the number of optimizer steps taken; 0 on a rank without optimizer state."""
    found = [int(holder["step"]) for holder in _counters(role) if "step" in holder]
    assert len(set(found)) <= 1, found
    return found[0] if found else 0


def set_steps_taken(role: TrainState, count: int) -> None:
    """Set all counters to tensors of their own, since AdamW adds 1 to each of them in place."""
    for holder in _counters(role):
        step = holder.get("step")  # a group has none before its first step
        holder["step"] = torch.full_like(step, count) if torch.is_tensor(step) else count


def _counters(role: TrainState) -> list[dict[str, Any]]:
    """Return the dictionaries that have a `step` or will get one, see `_counts_per_parameter`."""
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
    return [part.optimizer for part in role.optimizers()]
