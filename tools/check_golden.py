"""Compare the package's algorithms with golden vectors of the reference implementations.

    python tools/check_golden.py tests/golden/ma_ppo_cases.json --tolerance 1e-9

The JSON file has the format `ma_ppo_golden/1` (MA-RLHF: macro actions, advantages, losses and their
gradients, parsing) or `alol_golden/1` (A-LoL losses and sampling). Every case is computed in
float64 three times: alone, in a padded batch and, for MA-RLHF, in a packed batch.

Exit codes: 0 all errors are within the tolerance, 1 some are not, 2 the file cannot be used.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from marlhf_mega.algorithm.advantages import macro_advantages
from marlhf_mega.algorithm.alol import importance_weights, offline_loss, sampling_probabilities
from marlhf_mega.algorithm.choices import Compat, MacroReward, ValueRule
from marlhf_mega.algorithm.losses import policy_loss, value_loss
from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.algorithm.parsing import Sentence, parse_boundaries, read_bracketed
from marlhf_mega.algorithm.rewards import kl_estimate, token_rewards
from marlhf_mega.algorithm.termination import (
    fixed_ngram,
    given,
    ngrams_of_lengths,
    perplexity,
)

Case = dict[str, Any]
Comparisons = list[tuple[Case, float]]
MACRO_OUTPUTS = ("macro_values", "macro_rewards", "advantages", "returns")
IMPORTANCE_OUTPUTS = {
    "importance_sampling_ratio": False,
    "importance_sampling_ratio_per_token": True,
}
VALUE_RULES: dict[str, ValueRule] = {"equal": "equal", "unit": "unit", "position": "position_repo"}


def main() -> int:
    """Compare the cases of one file and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="golden file")
    parser.add_argument(
        "--tolerance", type=float, default=1e-9, help="largest absolute error (default: 1e-9)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(args.device)
    try:
        errors = check(json.loads(args.file.read_text()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        print(f"file={args.file}: must be a readable JSON file; {error}.", file=sys.stderr)
        return 2
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"file={args.file}: must be a golden file; {reason}.", file=sys.stderr)
        return 2
    return report(errors, args.tolerance)


def check(golden: dict[str, Any]) -> list[tuple[str, str, Comparisons]]:
    """Compare every case; return (group, layout, errors per case)."""
    layouts: dict[str, Callable[[list[Case]], Comparisons]]
    match golden["format"]:
        case "ma_ppo_golden/1":
            layouts = {"single": singly(padded), "padded": padded, "packed": packed}
            others = [(case, parsing_error(case)) for case in golden.get("parsing_cases", [])]
        case "alol_golden/1":
            layouts = {"single": singly(offline), "padded": offline}
            others = [(case, sampling_error(case)) for case in golden.get("sampling_cases", [])]
        case unknown:
            raise ValueError(f"format={unknown!r} is not ma_ppo_golden/1 or alol_golden/1")
    rows: dict[tuple[str, str], Comparisons] = defaultdict(list)
    for layout, compare_all in layouts.items():
        for case, error in compare_all(golden["cases"]):
            rows[group_of(case), layout].append((case, error))
    for case, error in others:
        rows[group_of(case), "single"].append((case, error))
    if not rows:
        raise ValueError("cases=[]: there is nothing to compare")
    return [(group, layout, errors) for (group, layout), errors in rows.items()]


def group_of(case: Case) -> str:
    """Return the table row that a case belongs to."""
    return case.get("group") or case.get("kind") or f"{case['impl']}/{case['algorithm']}"


def report(rows: list[tuple[str, str, Comparisons]], tolerance: float) -> int:
    """Print the table; return 1 if an error exceeds the tolerance, else 0."""
    print(f"{'group':28} {'layout':8} {'cases':>5}  largest error")
    failed = False
    for group, layout, errors in rows:
        worst_case, worst = max(errors, key=lambda error: error[1])
        bad = worst > tolerance
        failed |= bad
        mark = f"  FAILED at {worst_case['id']}" if bad else ""
        print(f"{group:28} {layout:8} {len(errors):5}  {worst:.1e}{mark}")
    compared = sum(len(errors) for _, _, errors in rows)
    verdict = f"beyond {tolerance:g}" if failed else f"all within {tolerance:g}"
    print(f"{compared} comparisons, {verdict}")
    return int(failed)


def singly(compare: Callable[[list[Case]], Comparisons]) -> Callable[[list[Case]], Comparisons]:
    """Return `compare` applied to batches of one case."""
    return lambda cases: [result for case in cases for result in compare([case])]


# --- macro-action PPO ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Cases with equal hyper-parameters as tensors [batch, response], right-padded."""

    cases: list[Case]
    span: Tensor
    """bool, all positions of a case, including its own trailing padding."""
    mask: Tensor
    """bool, real tokens."""
    starts: Tensor
    scores: Tensor
    """[batch]."""
    tokens: dict[str, Tensor]
    """old_logprobs, ref_logprobs, old_values, new_logprobs, new_values."""


def batches(cases: list[Case]) -> Iterator[Batch]:
    """Yield one batch per set of hyper-parameters, with mixed lengths, rules and n."""
    by_hyper = defaultdict(list)
    for case in cases:
        by_hyper[json.dumps((case["hyper"], pooling(case)), sort_keys=True)].append(case)
    return map(stack, by_hyper.values())


def pooling(case: Case) -> tuple[ValueRule, MacroReward]:
    """Return value rule and macro reward of a case; a vanilla case is token PPO."""
    rule = VALUE_RULES[case["value_function"]]
    return rule, "sum" if case["termination"] == "vanilla" else "mean"


def stack(cases: list[Case]) -> Batch:
    """Take the response from every array, and pad."""

    def rows(name: str, dtype: torch.dtype | None = None) -> Tensor:
        return pad(
            [torch.tensor(c["inputs"][name][-c["shape"]["R"] :], dtype=dtype) for c in cases]
        )

    names = ("old_logprobs", "ref_logprobs", "old_values", "new_logprobs", "new_values")
    span = pad([torch.ones(case["shape"]["R"], dtype=torch.bool) for case in cases])
    return Batch(
        cases=cases,
        span=span,
        mask=rows("action_mask", torch.bool),
        starts=pad([start_flags(case) for case in cases]),
        scores=torch.tensor([case["inputs"]["rm_score"] for case in cases]),
        tokens={name: rows(name) for name in names},
    )


def pad(rows: list[Tensor]) -> Tensor:
    """Right-pad with zeros to [batch, longest]."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def start_flags(case: Case) -> Tensor:
    """Return the start flags [R] of the case's rule.

    The reference starts an action after n real tokens even if padding follows, so n-gram rules see
    one position beyond the real tokens. The perplexity rule sees all positions.
    """
    params, num_real = case["params"], case["shape"]["response_valid"]
    span = torch.ones(1, case["shape"]["R"], dtype=torch.bool)
    counted = span & (torch.arange(span.size(1)) <= num_real)
    match case["termination"]:
        case "vanilla":
            starts = fixed_ngram(span, n=1)
        case "fixed":
            starts = fixed_ngram(counted, n=params["n"])
        case "randomized":
            starts = ngrams_of_lengths(counted, torch.tensor([params["shuffled_lengths"]]))
        case "ppl":
            surprise = torch.tensor([params["ppl"]]).log()
            starts = perplexity(span, -surprise, form="token", compat="ma_rlhf")
        case "given":
            supplied = torch.zeros_like(span)
            boundaries = torch.tensor(case["outputs"]["boundaries"]) - case["shape"]["start"]
            supplied[0, boundaries[:-1]] = True
            starts = given(span, supplied)
        case unknown:
            raise ValueError(f"case {case['id']}: termination={unknown!r} is not known")
    return starts[0]


def segment(batch: Batch) -> tuple[MacroActions, MacroActions]:
    """Return the macro actions over all positions, and over real tokens only."""
    vanilla = batch.cases[0]["termination"] == "vanilla"
    compat: Compat = "none" if vanilla else "ma_rlhf"
    actions = MacroActions.from_starts(batch.starts, batch.span, compat=compat)
    real = MacroActions.from_ids(torch.where(batch.mask, actions.ids, -1))
    return actions, real


def padded(cases: list[Case]) -> Comparisons:
    """Compare padded batches."""
    return [result for batch in batches(cases) for result in compare(batch, pack=False)]


def packed(cases: list[Case]) -> Comparisons:
    """Compare packed batches."""
    return [result for batch in batches(cases) for result in compare(batch, pack=True)]


def compare(batch: Batch, *, pack: bool) -> Comparisons:
    """Return each case's largest error over its outputs; losses compare as batch sums."""
    actions, real = segment(batch)
    rows, losses = compute(batch, real, pack=pack)
    batch_error = 0.0
    for name, loss_sum in losses.items():
        expected = sum(case["outputs"][name] for case in batch.cases)
        batch_error = max(batch_error, difference(loss_sum, expected))
    errors = []
    for row, case in enumerate(batch.cases):
        expected, num_macro = case["outputs"], int(actions.num_macro_actions[row])
        worst = max(
            batch_error, difference(actions.lengths[row, :num_macro], expected["segment_lengths"])
        )
        for name, values in rows.items():
            length = num_macro if name in MACRO_OUTPUTS else case["shape"]["R"]
            found, wanted = values[row, :length], torch.tensor(expected[name])
            if name == "token_rewards" and found.shape == wanted.shape:
                # Nothing reads the rewards of padding.
                found, wanted = (x[batch.mask[row, :length]] for x in (found, wanted))
            worst = max(worst, difference(found, wanted))
        errors.append((case, worst))
    return errors


def compute(
    batch: Batch, real: MacroActions, *, pack: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Compute the reference's outputs: tensors [batch, ...], and losses summed over the batch."""
    hyper = batch.cases[0]["hyper"]
    value_rule, macro_reward = pooling(batch.cases[0])
    layout = Layout(batch, pack=pack)
    tokens = {name: layout.tokens(values) for name, values in batch.tokens.items()}
    rewards = token_rewards(
        kl_estimate(
            layout.span(batch.tokens["old_logprobs"]),
            layout.span(batch.tokens["ref_logprobs"]),
            "k1",
        ),
        batch.scores,
        layout.score_positions(),
        kl_coef=hyper["kl_ctl"],
        score_clip=hyper["reward_clip"],
    )
    actions = real.pack() if pack else real
    macro = macro_advantages(
        layout.real(rewards),
        tokens["old_values"],
        actions,
        value_rule=value_rule,
        macro_reward=macro_reward,
        gamma=hyper["gamma"],
        gae_lambda=hyper["lam"],
    )
    logprobs = tokens["new_logprobs"].requires_grad_()
    values = tokens["new_values"].requires_grad_()
    actor = policy_loss(
        logprobs,
        tokens["old_logprobs"],
        macro.token_advantages,
        actions,
        aggregation="seq_mean_token_mean",
        clip_range=hyper["cliprange"],
    )
    critic = value_loss(
        values,
        tokens["old_values"],
        macro.token_returns,
        actions,
        aggregation="seq_mean_token_mean",
        clip_range=hyper["cliprange_value"],
    )
    actor_grad, critic_grad = torch.autograd.grad(
        actor.loss_sum + critic.loss_sum, (logprobs, values)
    )
    # Actions of trailing padding only lie beyond the grid of real tokens.
    width = batch.span.size(1) + 1
    grids = {
        "macro_values": macro.values,
        "macro_rewards": macro.rewards,
        "advantages": macro.advantages,
        "returns": macro.returns,
    }
    rows = {name: F.pad(grid, (0, width - grid.size(1))) for name, grid in grids.items()}
    rows["token_rewards"] = layout.unpack(rewards, batch.span)
    rows["actor_grad"] = layout.unpack(actor_grad, batch.mask)
    rows["critic_grad"] = layout.unpack(critic_grad, batch.mask)
    return rows, {"actor_loss": actor.loss_sum, "critic_loss": critic.loss_sum}


@dataclass(frozen=True)
class Layout:
    """Converts token tensors [batch, response] to the tested layout, padded or packed, and back."""

    batch: Batch
    pack: bool

    def span(self, padded_tokens: Tensor) -> Tensor:
        """Select all positions of all cases."""
        return padded_tokens[self.batch.span] if self.pack else padded_tokens

    def real(self, span_tokens: Tensor) -> Tensor:
        """Drop padding from the result of `span` if packed."""
        return span_tokens[self.batch.mask[self.batch.span]] if self.pack else span_tokens

    def tokens(self, padded_tokens: Tensor) -> Tensor:
        """Return a copy in the tested layout, real tokens only if packed."""
        return self.real(self.span(padded_tokens)).clone()

    def unpack(self, tokens: Tensor, where: Tensor) -> Tensor:
        """Convert back to [batch, response], zero elsewhere."""
        return torch.zeros(where.shape).masked_scatter(where, tokens) if self.pack else tokens

    def score_positions(self) -> Tensor:
        """Return the position one past the last real token, or the last one: the reference's."""
        counted = self.batch.mask.sum(1)
        lengths = self.batch.span.sum(1)
        firsts = torch.arange(len(lengths)) * self.batch.span.size(1)
        if self.pack:
            firsts = lengths.cumsum(0) - lengths
        return firsts + torch.minimum(counted, lengths - 1)


class GivenTrees:
    """A parser that returns the trees stored in the case."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def parse(self, text: str) -> list[Sentence]:
        """Locate each sentence in the text and read its tree."""
        sentences, position = [], 0
        for given_sentence in self.case["sentences"]:
            start = text.index(given_sentence["sentence"], position)
            position = start + len(given_sentence["sentence"])
            tree = read_bracketed(given_sentence["tree"], text, start)
            sentences.append(Sentence(start, position, tree))
        return sentences


def parsing_error(case: Case) -> float:
    """Return 0 if the segment lengths agree, else infinity."""
    ends = list(accumulate(len(token) for token in case["tokens"]))
    text = "".join(case["tokens"])
    offsets = [*zip([0, *ends], ends, strict=False), (len(text), len(text))]
    parsed = parse_boundaries(text, offsets, GivenTrees(case), case["cutoff"])
    starts = torch.tensor([parsed.starts])
    actions = MacroActions.from_starts(starts, torch.ones_like(starts), compat="ma_rlhf")
    agrees = actions.lengths[0].tolist() == case["segment_lengths"]
    return 0.0 if agrees and text == case["text"] and not parsed.fell_back else math.inf


# --- A-LoL --------------------------------------------------------------------------------------


def offline(cases: list[Case]) -> Comparisons:
    """Compare losses, gradients and importance weights in one padded batch per kind of case."""
    by_kind = defaultdict(list)
    for case in cases:
        by_kind[json.dumps((case["impl"], case["algorithm"], case["hyper"]))].append(case)
    return [result for group in by_kind.values() for result in compare_offline(group)]


def compare_offline(cases: list[Case]) -> Comparisons:
    """Compare cases whose responses are stacked; a case's loss is the mean over its responses."""
    options = offline_options(cases[0])
    sizes = [case["shape"]["B"] for case in cases]

    def rows(name: str) -> Tensor:
        return pad([torch.tensor(row) for case in cases for row in case["inputs"][name]])

    def scalars(name: str) -> Tensor:
        return torch.tensor([value for case in cases for value in case["inputs"][name]])

    logprobs, ref_logprobs = rows("logprobs").requires_grad_(), rows("ref_logprobs")
    mask = rows("response_mask") > 0
    output = offline_loss(
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        response_mask=mask,
        rewards=scalars("rewards"),
        values=scalars("values"),
        **options,
    )
    (gradient,) = torch.autograd.grad(output.loss_sum, logprobs)
    expected_sum = sum(
        case["outputs"]["loss"] * size for case, size in zip(cases, sizes, strict=True)
    )
    batch_error = difference(output.loss_sum, expected_sum) / len(mask)
    errors, first = [], 0
    for case, size in zip(cases, sizes, strict=True):
        own = slice(first, first + size), slice(case["shape"]["T"])
        worst = max(batch_error, difference(gradient[own] / size, case["outputs"]["grad_logprobs"]))
        for name, per_token in IMPORTANCE_OUTPUTS.items():
            if isinstance(case["outputs"].get(name), list):
                weights = importance_weights(
                    logprobs[own],
                    ref_logprobs[own],
                    mask[own],
                    per_token=per_token,
                    clip_range=options["clip_range"],
                )
                worst = max(worst, difference(weights, case["outputs"][name]))
        errors.append((case, worst))
        first += size
    return errors


def offline_options(case: Case) -> dict[str, Any]:
    """Translate the reference's flags to options of the package."""
    algorithm, clip, kl_coef = (
        case["algorithm"],
        case["hyper"]["ppo_clip"],
        case["hyper"]["kl_beta"],
    )
    return {
        "algorithm": "a_lol_kl" if algorithm == "a_lol" and kl_coef else algorithm,
        # In the reference zero means no clipping, except in a_lol_seq.
        "clip_range": clip if clip or algorithm == "a_lol_seq" else None,
        "kl_coef": kl_coef or 0.0,
        "compat": "lol_rl" if case["impl"] == "qlora_hh" else "none",
    }


def sampling_error(case: Case) -> float:
    """Return the largest error of non-zero probabilities; infinity if other responses have them."""
    inputs, outputs = case["inputs"], case["outputs"]
    advantages = inputs["good_advantages"]
    if case["strategy"] == "all_priority":
        advantages = advantages + inputs["bad_advantages"]
    probabilities = sampling_probabilities(torch.tensor(advantages), case["strategy"])
    chosen = probabilities.nonzero().squeeze(1)
    if chosen.tolist() != outputs["sample_indices"]:
        return math.inf
    return difference(probabilities[chosen], outputs["sample_probs"])


def difference(actual: Tensor, expected: object) -> float:
    """Return the largest absolute difference; infinity for other shapes or non-finite values."""
    target = torch.as_tensor(expected, dtype=torch.float64)
    if actual.shape != target.shape:
        return math.inf
    gap = (actual.detach().double() - target).abs()
    return math.inf if not gap.isfinite().all() else gap.max().item() if gap.numel() else 0.0


if __name__ == "__main__":
    sys.exit(main())
