"""Time everything that macro actions add to a PPO step, on random tensors.

    python tools/benchmark/macro_ops.py --threads 1 --rule fixed_ngram --n 5

Each timed call computes start flags, the macro-action record, pooled values and rewards, GAE, and
policy and value loss with their gradients, in float32 and for full-length responses. Prints a line
per shape and one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from marlhf_mega.algorithm.advantages import macro_advantages
from marlhf_mega.algorithm.counter_rng import fold
from marlhf_mega.algorithm.losses import policy_loss, value_loss
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.rewards import kl_estimate, last_token_positions, token_rewards
from marlhf_mega.algorithm.termination import (
    entropy,
    fixed_ngram,
    perplexity,
    probability,
    random_ngram,
    sentence,
    whole_response,
)

BATCH_SIZES = (1, 8, 32, 256)
RESPONSE_TOKENS = (128, 512, 1024)
REFERENCE_MS_PER_SAMPLE = {128: 6.1, 512: 24.0, 1024: 50.0}
"""MA-RLHF 807551d on one CPU thread at n = 5; it processes one sample at a time."""

Rule = Callable[[Tensor, Tensor], Tensor]


def rules(n: int) -> dict[str, Rule]:
    """Return functions (response_mask, ref_logprobs) -> start flags by rule name."""
    return {
        "token": lambda mask, _: fixed_ngram(mask, n=1),
        "fixed_ngram": lambda mask, _: fixed_ngram(mask, n=n),
        "random_ngram": lambda mask, _: random_ngram(
            mask,
            lengths=(2, 3, 5, 10),
            repeats=3,
            mode="cycle",
            keys=fold(1234, 0, torch.arange(mask.size(0))),
        ),
        "perplexity_token": lambda mask, ref: perplexity(mask, ref, form="token"),
        "perplexity_prefix": lambda mask, ref: perplexity(mask, ref, form="prefix"),
        "perplexity_segment": lambda mask, ref: perplexity(mask, ref, form="segment"),
        "probability": lambda mask, ref: probability(mask, ref, below=0.2),
        "entropy": lambda mask, ref: entropy(mask, -ref, share=0.3),
        "sentence": lambda mask, ref: sentence(mask, ref > -0.05),
        "whole_response": lambda mask, _: whole_response(mask),
    }


def macro_step(rule: Rule, tokens: dict[str, Tensor], mask: Tensor, scores: Tensor) -> None:
    """Run what is timed once."""
    actions = MacroActions.from_starts(rule(mask, tokens["ref_logprobs"]), mask)
    rewards = token_rewards(
        kl_estimate(tokens["old_logprobs"], tokens["ref_logprobs"], "k1"),
        scores,
        last_token_positions(mask),
        kl_coef=0.05,
    )
    macro = macro_advantages(
        rewards,
        tokens["old_values"],
        actions,
        value_rule="equal",
        macro_reward="sum",
        gamma=1.0,
        gae_lambda=0.95,
    )
    actor = policy_loss(tokens["logprobs"], tokens["old_logprobs"], macro.token_advantages, actions)
    critic = value_loss(tokens["values"], tokens["old_values"], macro.token_returns, actions)
    (actor.loss_sum + critic.loss_sum).backward()


def measure(rule: Rule, batch: int, response: int, seconds: float) -> tuple[float, float]:
    """Return the median and the minimum of milliseconds per batch."""
    generator = torch.Generator().manual_seed(1234)
    names = ("logprobs", "old_logprobs", "ref_logprobs", "values", "old_values")
    tokens = {name: -torch.rand(batch, response, generator=generator) for name in names}
    mask = torch.ones(batch, response, dtype=torch.bool)
    scores = torch.rand(batch, generator=generator)
    for name in ("logprobs", "values"):
        tokens[name].requires_grad_()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times) < 10:
        tokens["logprobs"].grad = tokens["values"].grad = None
        start = time.perf_counter()
        macro_step(rule, tokens, mask, scores)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times), min(times)


def main() -> None:
    """Measure every shape and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--rule",
        choices=list(rules(1)),
        default="fixed_ngram",
        help="macro.rule, for perplexity with its form (default: fixed_ngram)",
    )
    parser.add_argument(
        "--n", type=int, default=5, help="tokens per action of fixed_ngram (default: 5)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="time spent on each shape (default: 0.5)"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rule = rules(args.n)[args.rule]
    results = []
    for response in RESPONSE_TOKENS:
        for batch in BATCH_SIZES:
            ms, least_ms = measure(rule, batch, response, args.seconds)
            ratio = REFERENCE_MS_PER_SAMPLE[response] * batch / ms
            results.append(
                {
                    "batch": batch,
                    "response_tokens": response,
                    "ms_per_batch": round(ms, 4),
                    "least_ms_per_batch": round(least_ms, 4),
                    "ms_per_sample": round(ms / batch, 5),
                    "times_cheaper_than_reference": round(ratio, 1),
                }
            )
            print(
                f"B={batch:<4} R={response:<5} {ms:8.3f} ms per batch (min {least_ms:.3f}), "
                f"{ms / batch:.4f} ms per sample: {ratio:.0f} times cheaper than the reference"
            )
    summary = {
        "rule": args.rule,
        "n": args.n,
        "threads": args.threads,
        "dtype": "float32",
        "reference_ms_per_sample": REFERENCE_MS_PER_SAMPLE,
        "results": results,
    }
    print(json.dumps(summary))
    if args.out:
        args.out.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
