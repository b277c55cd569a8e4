"""Pure tensor maths of macro-action PPO: no Megatron, no process groups, no config.

`import marlhf_mega.algorithm as ma` gives all functions and records of `__all__`. A module is
imported when something of it is first used, since the names of the choices need no torch.
"""

import importlib
from typing import Any

_MODULES = {
    "advantages": (
        "MacroAdvantages",
        "adaptive_lambda",
        "gae",
        "macro_advantages",
        "segment_advantages",
    ),
    "alol": ("offline_loss", "sampling_probabilities"),
    "filters": (
        "best_of_n",
        "best_random",
        "best_worst",
        "has_spread",
        "power_probabilities",
        "power_resample",
    ),
    "group_advantages": ("group_centred", "group_normalised", "leave_one_out", "returns_to_go"),
    "continuations": ("continuation_advantages", "continuation_values"),
    "losses": (
        "LossOutput",
        "entropy_loss",
        "kl_loss",
        "over_budget",
        "policy_loss",
        "preference_loss",
        "preference_span_loss",
        "sampler_mask",
        "sampler_weights",
        "sft_loss",
        "value_loss",
    ),
    "macro_actions": ("MacroActions", "value_weights"),
    "parsing": ("parse_boundaries",),
    "policy_losses": ("cispo_loss", "p3o_loss", "pg_loss"),
    "reward_models": ("correlation", "head_overlap", "odin_penalty", "smooth_labels"),
    "rewards": (
        "RunningMoments",
        "adaptive_kl_coef",
        "handle_missing_eos",
        "kl_estimate",
        "shape_scores",
        "token_rewards",
    ),
    "termination": (
        "entropy",
        "fixed_ngram",
        "perplexity",
        "post_process",
        "probability",
        "random_ngram",
        "sentence",
        "whole_response",
    ),
}
__all__ = [name for names in _MODULES.values() for name in names]


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
