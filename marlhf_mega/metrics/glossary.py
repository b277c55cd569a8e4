"""What each metric is called on screen, its unit, and which way is up."""

from dataclasses import dataclass, replace
from typing import Literal

from marlhf_mega.metrics.format import number, rounded


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    label: str
    unit: str = ""
    """`%`: recorded as a share from 0 to 1, shown as per cent."""
    higher_is_better: bool | None = None
    """None: neither way is better in itself."""
    about: str = ""
    """What it measures, in a sentence."""

    @property
    def scale(self) -> float:
        """The factor from recorded to shown values."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def is_amount(self) -> bool:
        """Whether zero is where it starts: counts, times, sizes, shares."""
        return self.unit not in ("", "nats")

    @property
    def title(self) -> str:
        """The label with the unit, for a column or row of bare numbers."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def bare(self, value: float | None, error: float | None = None) -> str:
        """Write a value without its unit, to the digits that its standard error allows."""
        shown = None if value is None else value * self.scale
        return rounded(shown, error and error * self.scale)

    def text(self, value: float | None, error: float | None = None) -> str:
        """Write a value with its unit."""
        return f"{self.bare(value, error)} {self.unit}".rstrip()

    def with_error(self, value: float | None, error: float | None) -> str:
        """Write a value and the standard error it may have, without the unit."""
        shown = self.bare(value, error)
        return f"{shown} \N{PLUS-MINUS SIGN} {self.bare(error, error)}" if error else shown

    def change(self, before: float | None, after: float | None) -> str:
        """Write by how much a value has grown, with three digits and without the unit."""
        if before is None or after is None:
            return "-"
        grown = float(f"{(after - before) * self.scale:.3g}")
        return ("+" if grown > 0 else "") + number(grown)


METRICS = {
    "eval/accuracy": Metric(
        "accuracy", "%", True, about="Held-out pairs whose chosen response scores higher."
    ),
    "eval/gold_mean": Metric(
        "gold reward",
        "",
        True,
        about="Mean over held-out prompts by evaluate.gold, a judge that never trains.",
    ),
    "eval/score_mean": Metric(
        "reward model score", "", True, about="Mean score of the reward on held-out data."
    ),
    "eval/win_rate": Metric(
        "win rate over the start",
        "%",
        True,
        about="Held-out prompts whose answer now scores above the one before training; ties count "
        "half, and 50 % is no change.",
    ),
    "eval/win_rate_over_other": Metric(
        "win rate over the other policy",
        "%",
        True,
        about="Held-out prompts whose answer scores above that of the policy in evaluate.against; "
        "ties count half, and 50 % is no difference.",
    ),
    "eval/gold_win_rate_over_other": Metric(
        "gold win rate over the other policy",
        "%",
        True,
        about="The same, as evaluate.gold judges the answers.",
    ),
    "eval/loss": Metric(
        "held-out loss", "nats", False, about="The training loss on held-out data; lower is better."
    ),
    "eval/perplexity": Metric(
        "perplexity", "", False, about="exp of the held-out loss per token; lower is better."
    ),
    "eval/margin": Metric(
        "margin",
        "",
        True,
        about="Mean score of chosen minus rejected responses, on held-out pairs.",
    ),
    "eval/accuracy/*": Metric(
        "accuracy, *", "%", True, about="Held-out pairs of one file whose chosen response wins."
    ),
    "eval/calibration_error": Metric(
        "calibration error (ECE)",
        "%",
        False,
        about="How far the model's confidence in the higher score is from how often that score is "
        "right, on held-out pairs.",
    ),
    "eval/length_correlation": Metric(
        "correlation with length",
        about="Of the score with the tokens of a response, on held-out pairs; near 0 if length is "
        "no merit.",
    ),
    "eval/kl": Metric(
        "KL from the reference",
        "nats",
        about="Sum over a response of log p / p_reference, mean over held-out prompts: how far the "
        "policy has moved.",
    ),
    "eval/response_tokens": Metric(
        "response length", "tokens", about="Mean length of held-out answers, end token included."
    ),
    "eval/truncated_fraction": Metric(
        "truncated", "%", about="Held-out answers cut off at the length limit."
    ),
    "eval/distinct_*_per_input": Metric(
        "distinct-* per prompt",
        "%",
        about="Different n-grams among all n-grams of the responses to a prompt, mean over held-"
        "out prompts: 100 % if none is repeated.",
    ),
    "eval/distinct_*_cross_input": Metric(
        "distinct-* across prompts",
        "%",
        about="Different n-grams among all n-grams of one response to every held-out prompt.",
    ),
    "eval/self_bleu_per_input": Metric(
        "self-BLEU per prompt",
        "%",
        about="BLEU of each response against the others to its prompt, mean: 100 % if all are the "
        "same.",
    ),
    "eval/self_bleu_cross_input": Metric(
        "self-BLEU across prompts",
        "%",
        about="BLEU of one response to each held-out prompt against those to the others, mean.",
    ),
    "eval/score_std": Metric(
        "spread of the score", about="Standard deviation over held-out responses."
    ),
    "rollout/score_mean": Metric(
        "reward score",
        "",
        True,
        about="Mean raw score of the responses that are trained on, before shaping.",
    ),
    "rollout/score_std": Metric(
        "spread of the score", about="Standard deviation of the scores of one step."
    ),
    "rollout/logprob_gap*": Metric(
        "sampler-trainer gap*",
        "nats",
        about="Mean |difference| between the log-probs of sampler and trainer; should be near 0.",
    ),
    "rollout/dense_reward": Metric(
        "dense rewards", "", True, about="Mean over the step's responses of their sum over tokens."
    ),
    "rollout/violation_fraction": Metric(
        "violations", "%", False, about="Responses that break one of reward.constraints."
    ),
    "eval/violation_fraction": Metric(
        "violations", "%", False, about="Held-out answers that break one of reward.constraints."
    ),
    "rollout/continuation_tokens": Metric(
        "length of continuations",
        "tokens",
        about="New tokens of a response from the start of a macro action, which tells its value.",
    ),
    "rollout/masked_fraction": Metric(
        "tokens left out", "%", about="Tokens that masks of ppo keep from the policy's loss."
    ),
    "rollout/kept_probability": Metric(
        "probability of kept tokens",
        "%",
        about="The policy's probability of all tokens that its filters, or NLPO's mask, leave.",
    ),
    "rollout/kept_fraction": Metric(
        "samples kept", "%", about="Different samples that rollout.filter leaves, of all generated."
    ),
    "rollout/distinct_samples": Metric(
        "distinct samples", about="Different samples among those that are trained on."
    ),
    "rollout/generation_tries": Metric(
        "tries", about="How often the step generated until enough prompts had unlike scores."
    ),
    "rollout/unfiltered_score": Metric(
        "score before the filter", "", True, about="Mean raw score of all responses generated."
    ),
    "rollout/staleness": Metric(
        "staleness", "PPO steps", about="Age of the weights that generated the responses."
    ),
    "rollout/response_tokens": Metric(
        "response length", "tokens", about="Mean over the step's responses, end token included."
    ),
    "rollout/truncated_fraction": Metric(
        "truncated", "%", about="Responses cut off at the length limit."
    ),
    "rollout/reshard_gib": Metric(
        "weights sent", "GiB", about="By all ranks together, to the layout that generates."
    ),
    "policy/loss": Metric(
        "policy loss", about="Clipped surrogate; its level says little, its jumps do."
    ),
    "policy/kl_loss": Metric(
        "KL loss", about="KL from the reference as a term of the loss, before its weight."
    ),
    "policy/entropy_loss": Metric(
        "entropy in the loss", "nats", about="Entropy as a term of the loss, before its weight."
    ),
    "policy/kl": Metric(
        "KL from the reference",
        "nats",
        about="Sum over a response of log p / p_reference, mean over responses.",
    ),
    "policy/approx_kl": Metric(
        "KL of the update",
        "nats",
        about="Per token, between the policy at rollout and while it is updated.",
    ),
    "policy/entropy": Metric(
        "entropy", "nats", about="Of the policy's next-token distribution, mean over tokens."
    ),
    "policy/ratio": Metric(
        "probability ratio",
        about="Mean of p / p at rollout in the updates, per token or macro action; 1 before them.",
    ),
    "policy/routing_differs": Metric(
        "routing that differs",
        about="Share of tokens, over layers and updates, whose replayed experts are not those that "
        "the trainer's own router would choose.",
    ),
    "policy/advantage_std": Metric(
        "spread of advantages",
        about="Standard deviation over tokens, before whitening: how much noise the gradient has.",
    ),
    "policy/kl_coef": Metric(
        "KL coefficient", about="Weight of the KL penalty in the reward of each token."
    ),
    "policy/fp8_logprob_gap*": Metric(
        "FP8 gap*", "nats", about="Log-probs in FP8 against those in BF16."
    ),
    "critic/explained_variance": Metric(
        "explained variance",
        "",
        True,
        about="Share of the returns' variance that the critic predicts; 1 is perfect, 0 is a "
        "constant guess.",
    ),
    "critic/loss": Metric(
        "critic loss", "", False, about="Squared error of the values, clipped; lower is better."
    ),
    "critic/return_mean": Metric("mean return", about="What the critic is to predict."),
    "critic/value": Metric("mean value", about="What the critic predicts."),
    "macro/actions_per_response": Metric(
        "macro actions", "per response", about="Decisions that a response is divided into."
    ),
    "macro/tokens_per_action": Metric(
        "length of a macro action", "tokens", about="Mean over all macro actions of the step."
    ),
    "sft/loss": Metric(
        "training loss", "nats", False, about="Cross entropy per response token; lower is better."
    ),
    "reward/loss": Metric(
        "training loss",
        "nats",
        False,
        about="-log sigmoid of the margin between chosen and rejected; lower is better.",
    ),
    "reward/accuracy": Metric(
        "accuracy", "%", True, about="Pairs of the batch whose chosen response scores higher."
    ),
    "reward/margin": Metric(
        "margin", "", True, about="Mean score of chosen minus rejected responses of the batch."
    ),
    "reward/score": Metric("mean score", about="Over chosen and rejected responses of the batch."),
    "reward/score_square": Metric(
        "mean squared score", about="How far scores are from zero; centring keeps it small."
    ),
    "preference/score": Metric(
        "reward score", "", True, about="Mean score of the responses that were judged in the step."
    ),
    "preference/win_rate": Metric(
        "wins over the opponent",
        "%",
        about="How likely the judge prefers the policy's response; of ipo_md, the first one.",
    ),
    "preference/loss": Metric(
        "training loss", "", False, about="Of the batch, by preference.loss; lower is better."
    ),
    "preference/accuracy": Metric(
        "accuracy",
        "%",
        True,
        about="Pairs of the batch whose chosen response has the higher implicit reward.",
    ),
    "preference/margin": Metric(
        "margin", "", True, about="Implicit reward of chosen minus rejected responses of the batch."
    ),
    "preference/nll": Metric(
        "chosen responses",
        "nats",
        False,
        about="Negative log-likelihood per token of the chosen responses; it may rise unless "
        "preference.nll_coef holds it.",
    ),
    "preference/chosen_reward": Metric(
        "reward of the chosen", about="Implicit reward of the chosen responses of the batch."
    ),
    "preference/rejected_reward": Metric(
        "reward of the rejected", about="Implicit reward of the rejected responses of the batch."
    ),
    "reward/length_correlation": Metric(
        "correlation with length",
        about="Of the score that becomes the reward, over the responses of the batch; 0 is best.",
    ),
    "reward/length_head_correlation": Metric(
        "correlation of the length head",
        about="With the length, over the responses of the batch: what is kept out of the score.",
    ),
    "reward/head_overlap": Metric(
        "overlap of the heads", about="|cosine| between their weights; 0 if they are orthogonal."
    ),
    "reward/latent_kl": Metric(
        "KL of the latents",
        "nats",
        about="Of what is inferred of a user from N(0, 1), mean over the pairs of the batch; near "
        "0 the score does not depend on the user.",
    ),
    "offline/loss": Metric("training loss", "", False, about="Of the batch; lower is better."),
    "offline/advantage": Metric(
        "advantage", about="Given score minus what the value model expects, mean over the batch."
    ),
    "offline/kl": Metric(
        "KL from the reference", "nats", about="Of the given responses, log p / p_reference."
    ),
    "perf/tokens_per_second": Metric(
        "throughput", "tokens/s", about="Of all ranks, prompts and responses."
    ),
    "perf/tokens_per_second_*": Metric("throughput, *", "tokens/s", about="Of all ranks."),
    "perf/tflops_*": Metric("compute, *", "TFLOP/s", about="Per device, of the model's own work."),
    "perf/mfu_*": Metric(
        "MFU, *", "%", about="Share of the device's peak that the model's own work takes."
    ),
    "perf/peak_memory_gib": Metric("peak memory", "GiB", about="Highest of all ranks so far."),
    "*_peak_memory_gib": Metric("peak memory, *", "GiB", about="Highest of all ranks."),
    "*/tokens_per_second": Metric("throughput", "tokens/s", about="Of all ranks."),
    "*/lr": Metric("learning rate", about="Mean over the step's updates."),
    "*/grad_norm": Metric("gradient norm", about="Before clipping; mean over the step's updates."),
    "policy/clip_fraction": Metric(
        "clipped ratios", "%", about="Share of the loss's terms that ppo.clip_range limits."
    ),
    "critic/clip_fraction": Metric(
        "clipped values",
        "%",
        about="Share of the loss's terms that ppo.value_clip_range limits.",
    ),
    "*/skipped_fraction": Metric(
        "skipped steps", "%", about="Optimizer steps left out because a gradient was not finite."
    ),
    "rollout/invalid_fraction": Metric(
        "responses without a score", "%", about="Their reward failed; they take no part."
    ),
    "macro/fallback_fraction": Metric(
        "segmented by the fallback", "%", about="Responses that could not be parsed."
    ),
    "time/generation_seconds": Metric(
        "generation", "s", about="Of the responses, on the ranks that generate."
    ),
    "time/offload_seconds": Metric(
        "offload", "s", about="Moving idle models between device and host."
    ),
    "time/reshard_seconds": Metric(
        "reshard", "s", about="Bringing new weights to the layout that generates."
    ),
    "*_fraction": Metric("*", "%"),
    "*_tokens": Metric("* length", "tokens"),
    "*_seconds": Metric("*", "s"),
    "*_gib": Metric("*", "GiB"),
    "*_mean": Metric("*"),
    "*": Metric("*"),
}
"""Pattern of names -> how they are shown. The first that fits counts; screens keep the order.

`*` stands for the rest of a name, and in a label for its words.
"""


WIN_RATES = {
    "eval/score_mean": "eval/win_rate_over_other",
    "eval/gold_mean": "eval/gold_win_rate_over_other",
}
"""Metric in which samples win or lose against those of another policy -> the win rate."""


def lookup(name: str) -> Metric:
    """Return how a metric is shown; one that is not listed is shown by the words of its name."""
    pattern = _pattern(name)
    head, _, tail = pattern.partition("*")
    words = name[len(head) : len(name) - len(tail)]
    words = (words.partition("/")[2] or words).replace("_", " ")
    return replace(METRICS[pattern], label=METRICS[pattern].label.replace("*", words))


def stderr_name(name: str) -> str:
    """Return the metric that holds the standard error of another: `x_mean` -> `x_stderr`."""
    return name.removesuffix("_mean") + "_stderr"


def change_name(name: str) -> str:
    """Return the metric that holds the change of another since the start, `x_mean`: `x_change`."""
    return name.removesuffix("_mean") + "_change"


def other_name(name: str) -> str:
    """Return the metric that holds what another policy has: `eval/x` -> `other/x`."""
    return name.replace("eval/", "other/", 1)


def is_beside(name: str) -> bool:
    """Whether a metric only goes with another: its error, its change, its interval, the other's."""
    return name.startswith("other/") or name.endswith(
        ("_stderr", "_change", "_other_low", "_other_high", "_other_ties")
    )


def clear_change(
    change: float | None, error: float | None, higher_is_better: bool | None
) -> Literal["good", "bad"] | None:
    """Whether what has a good direction has clearly moved: by more than two standard errors."""
    if higher_is_better is None or not change or not error or abs(change) <= 2 * error:
        return None
    return "good" if (change > 0) == higher_is_better else "bad"


def order(name: str) -> tuple[int, str]:
    """Return the sort key of a metric on screens: the most telling first."""
    return list(METRICS).index(_pattern(name)), name


def _pattern(name: str) -> str:
    return next(pattern for pattern in METRICS if _fits(name, pattern))


def _fits(name: str, pattern: str) -> bool:
    head, star, tail = pattern.partition("*")
    if not star:
        return name == pattern
    return len(name) >= len(head + tail) and name.startswith(head) and name.endswith(tail)
