"""Names that select a formula. The configuration offers them and the algorithms implement them."""

from typing import Any, Literal, get_args

MacroRule = Literal[
    "token",
    "fixed_ngram",
    "random_ngram",
    "perplexity",
    "probability",
    "entropy",
    "parsing",
    "sentence",
    "whole_response",
]
"""Where macro actions end."""
RandomMode = Literal["list", "cycle"]
"""What follows the shuffled list of `random_ngram`."""
PerplexityForm = Literal["token", "prefix", "segment"]
"""Whose perplexity must rise for a new action."""
EosRule = Literal["join", "own"]
"""Whether the end token belongs to the last action."""
Compat = Literal["none", "ma_rlhf"]
"""Whether to reproduce the released MA-RLHF code."""
ValueRule = Literal["equal", "unit", "position", "position_repo", "first"]
"""How token values are averaged into the value of an action."""
MacroReward = Literal["sum", "mean"]
"""How token rewards become the reward of an action."""
StepUnit = Literal["per_macro", "per_token"]
"""What gamma or lambda counts."""

Estimator = Literal[
    "gae",
    "sae",
    "rloo",
    "grpo",
    "dr_grpo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "vine",
    "brain",
]
"""How advantages are estimated."""
Objective = Literal["clip", "cispo", "pg", "p3o"]
"""What the policy's loss is."""
MismatchUnit = Literal["token", "macro", "sequence"]
"""What is left out together where sampler and trainer disagree."""
Ratio = Literal["token", "macro", "macro_geo"]
"""Of what a likelihood ratio is taken."""
ValueTarget = Literal["token", "macro"]
"""Which values regress to the return of an action."""
Aggregation = Literal[
    "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_sum_const", "macro_mean"
]
"""What a loss is a mean over."""

RewardKl = Literal["k1", "k2", "k3", "abs"]
"""Estimators of the KL penalty in the reward."""
LossKl = Literal["k2", "k3_straight_through"]
"""Estimators of the KL penalty in the loss."""
SampleFilter = Literal["pf_ppo", "best_worst", "best_random", "best_of_n", "dynamic"]
"""Which samples of a step are trained on."""
MissingEos = Literal["none", "subtract", "replace"]
"""What happens to the score of a truncated response."""
ScoreNormalization = Literal["none", "running", "running_scale"]
"""Which running moments of the scores are divided out."""
Combination = Literal["sum", "robust", "maxmin"]
"""How the scores of several sources become one."""
DenseReward = Literal["rto", "sentence", "clause"]
"""What rewards tokens before the last one."""
Shaping = Literal[
    "par",
    "center_reference",
    "length_penalty",
    "overlong",
    "z_score",
]
"""What is done to the scores first."""

OfflineAlgorithm = Literal[
    "nll",
    "wbc",
    "r_gold",
    "r_lol",
    "a_lol",
    "a_lol_seq",
    "a_lol_macro",
    "a_lol_ref_free",
    "a_lol_kl",
]
"""Losses of offline RL."""
PrioritySampling = Literal["good_priority", "good_random", "all_priority"]
"""How offline RL draws among the responses with a positive advantage."""
OfflineCompat = Literal["none", "lol_rl"]
"""Whether to reproduce the released A-LoL code."""

PreferenceLoss = Literal["dpo", "ipo", "pro", "cpl", "xpo", "refuel", "bfpo", "nash_md", "ipo_md"]
"""Losses of a policy on preference pairs."""
PairMargin = Literal["none", "offset", "weight"]
"""What the margin of a pair does."""


def check_choice(key: str, value: str, *choices: Any) -> None:
    """Refuse a name that stands for no formula.

    Args:
        key: what the message calls it.
        value: the name.
        choices: types above, one of which must have it.

    Raises:
        ValueError: none of them has it.
    """
    known = dict.fromkeys(name for choice in choices for name in get_args(choice))
    if value not in known:
        raise ValueError(f"{key}={value}: must be one of {', '.join(known)}. Choose one.")
