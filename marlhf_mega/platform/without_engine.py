"""Megatron-Core where Transformer Engine is not installed, with or without a GPU.

Megatron then uses torch's AdamW, which keeps a `step` in each parameter's state. What the
checkpoint layer must do about it with a DistributedOptimizer, whatever its sharding type:

1. Before `optimizer.sharded_state_dict(..., is_loading=True)` on an optimizer that never stepped,
   give every parameter of `optimizer.optimizer.param_groups` a state with `step`, `exp_avg` and
   `exp_avg_sq` zeros; Megatron asserts that there is one `step` and fails on an empty state.
2. After `optimizer.load_state_dict`, write into every parameter's state a `step` tensor of its own
   with the number of optimizer steps taken, from the trainer's saved counter. Megatron puts one
   and the same tensor into all of them, and AdamW, which adds 1 to each, then counts as many steps
   per step as there are parameters; with `dp_reshardable` its value is the zero of point 1.
   Nothing fails: the bias correction of the resumed run is wrong. Compare the second step after a
   resume with an uninterrupted run, since the first one's loss does not depend on it.
"""

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch

from marlhf_mega.platform.patches import MEGATRON, PatchSet


def install() -> None:
    """Repair what Megatron leaves broken where Transformer Engine cannot be imported."""
    _patches.install()


def uninstall() -> None:
    """Put every replaced attribute back."""
    _patches.uninstall()


def _on_import(patches: PatchSet, module: ModuleType) -> None:
    match module.__name__.removeprefix(MEGATRON + "."):
        case "optimizer.distrib_optimizer":
            optimizer = module.DistributedOptimizer
            name = "_set_main_param_and_optimizer_states"
            patches.replace(optimizer, name, _keeping_absent_states(vars(optimizer)[name]))
        case "transformer.moe.moe_utils" if not hasattr(module, "te_general_gemm"):
            # 0.16.1 forgets to define the name when the import of Transformer Engine fails.
            patches.replace(module, "te_general_gemm", None)


def _keeping_absent_states(set_states: Callable[..., None]) -> Callable[..., None]:
    """Return Megatron's state setter, not failing on states that the checkpoint does not hold.

    Torch's AdamW state has a `step` that Megatron leaves out of the tensors it saves, but asks
    for when it loads (KeyError: 'step').
    """

    @wraps(set_states)
    def set_present_states(
        self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        set_states(self, model_param, {**self.optimizer.state[main_param], **tensors})

    return set_present_states


_patches = PatchSet(_on_import)
