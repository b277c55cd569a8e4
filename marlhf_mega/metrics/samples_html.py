"""Samples in the report: the first and the last ones, macro actions as coloured stretches."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from marlhf_mega.metrics.progress import number

MAX_PROMPTS = 8
NUM_SHADES = 6


def samples_section(samples: Sequence[Mapping[str, Any]]) -> str:
    """Show the samples of the first and of the last step that has some, grouped by prompt.

    Args:
        samples: lines of samples.jsonl: `step, prompt, tokens, action_starts, score, gold`.
    """
    if not samples:
        return ""
    first, last = samples[0]["step"], samples[-1]["step"]
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        if sample["step"] in (first, last):
            by_prompt.setdefault(str(sample["prompt"]), []).append(sample)
    # Prompts answered at both times tell the most, then those answered last.
    telling = sorted(
        by_prompt.items(),
        key=lambda item: (-len({s["step"] for s in item[1]}), -item[1][-1]["step"]),
    )
    cards = [_card(prompt, answers) for prompt, answers in telling[:MAX_PROMPTS]]
    segmented = any(sample.get("action_starts") for sample in samples)
    note = " &middot; each colour is one macro action" if segmented else ""
    return f"<h3>samples{note}</h3>{''.join(cards)}"


def _card(prompt: str, answers: Sequence[Mapping[str, Any]]) -> str:
    replies = "".join(_reply(answer) for answer in answers)
    return f'<div class="card sample"><div class="prompt">{escape(prompt)}</div>{replies}</div>'


def _reply(sample: Mapping[str, Any]) -> str:
    facts = [f"step {sample['step']}"]
    for key in ("score", "gold"):
        if sample.get(key) is not None:
            facts.append(f"{key} <b>{number(sample[key])}</b>")
    starts = list(sample.get("action_starts") or ())
    tokens = [str(token) for token in sample["tokens"]]
    facts.append(f"{len(tokens)} tokens" + (f", {len(starts)} macro actions" if starts else ""))
    body = _actions(tokens, starts) if starts else escape("".join(tokens))
    return (
        f'<div class="reply-head">{" &middot; ".join(facts)}</div><div class="reply">{body}</div>'
    )


def _actions(tokens: Sequence[str], starts: Sequence[int]) -> str:
    parts = []
    for index, (start, end) in enumerate(zip(starts, [*starts[1:], len(tokens)], strict=True)):
        inner = "".join(f"<span>{escape(token)}</span>" for token in tokens[start:end])
        parts.append(
            f'<span class="action action{index % NUM_SHADES}" title="macro action {index + 1}:'
            f' {end - start} tokens">{inner}</span>'
        )
    return "".join(parts)
