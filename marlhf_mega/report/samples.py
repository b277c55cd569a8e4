"""Which samples the report shows, and their macro actions as coloured spans."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marlhf_mega.metrics.format import number

SampleLine = Mapping[str, Any]
"""A line of samples.jsonl, see `metrics.writers.Sample`."""

MAX_SAMPLES = 4
"""Of each step."""
MAX_SPANS = 160
"""Of each sample; what follows is shown as plain text."""
STRIPS = ("advantage", "value", "kl")
"""What every macro action carries."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """One macro action on the page."""

    tokens: Sequence[str]
    """The text that each token adds; several tokens may share a character, which the first has."""
    end: str | None
    """The end token, if it is the last one."""
    is_gain: bool
    """Whether the advantage is above zero."""
    strength: int
    """Share of the full colour, in per cent."""
    title: str
    """Which action it is, and how long."""
    numbers: Sequence[tuple[str, str]]
    """(label, text) of advantage, value and KL."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One quantity of all actions of a sample, as bars over the tokens; 100 wide, 20 high."""

    label: str
    top: str
    """What a bar of full height stands for."""
    gains: str
    losses: str
    """Paths of the bars above and below zero."""


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The largest absolute advantage, value and KL of some samples: the same scale for all."""

    num_actions: int
    largest: Mapping[str, float]
    """1 where all are zero."""

    @staticmethod
    def of(samples: Iterable[SampleLine]) -> "Scales":
        """Find them."""
        actions = [action for sample in samples for action in sample.get("actions") or []]
        largest = {
            row: max((abs(action[row] or 0.0) for action in actions), default=0.0) or 1.0
            for row in STRIPS
        }
        return Scales(num_actions=len(actions), largest=largest)


def first_and_last(samples: Sequence[SampleLine]) -> dict[int, list[SampleLine]]:
    """Return samples of the first and of the last step that has some, by step.

    Prompts answered at both steps tell the most: they come first, in the same order.
    """
    steps = sorted({sample["step"] for sample in samples})
    by_step = {
        step: [s for s in samples if s["step"] == step] for step in (*steps[:1], *steps[-1:])
    }
    prompts = [{sample["prompt"] for sample in some} for some in by_step.values()]
    in_all = prompts[0].intersection(*prompts) if prompts else set()

    def position(sample: SampleLine) -> tuple[bool, str]:
        is_common = sample["prompt"] in in_all
        return not is_common, sample["prompt"] if is_common else ""

    return {step: sorted(some, key=position)[:MAX_SAMPLES] for step, some in by_step.items()}


def spans(sample: SampleLine, scales: Scales) -> list[Span]:
    """Return the macro actions of a sample; none if it was not segmented."""
    actions, tokens = sample.get("actions") or [], sample["tokens"]
    found = []
    for index, action in enumerate(actions[:MAX_SPANS]):
        stop = action["start"] + action["length"]
        advantage = action["advantage"] or 0.0
        share = min(abs(advantage) / scales.largest["advantage"], 1.0)
        size = f"{action['length']} token" + ("" if action["length"] == 1 else "s")
        span = Span(
            tokens=tokens[action["start"] : stop],
            end=sample.get("end") if stop == len(tokens) else None,
            is_gain=advantage > 0,
            strength=round(100 * share**0.7),
            title=f"macro action {index + 1} of {len(actions)}, {size}",
            numbers=[(row, signed(action[row])) for row in STRIPS],
        )
        found.append(span)
    return found


def rest(sample: SampleLine) -> str:
    """Return the text that no span shows."""
    shown = (sample.get("actions") or [])[:MAX_SPANS]
    return "".join(sample["tokens"][sum(action["length"] for action in shown) :])


def strips(sample: SampleLine, scales: Scales) -> list[Strip]:
    """Return a strip of bars for each of advantage, value and KL that is not zero throughout."""
    actions = (sample.get("actions") or [])[:MAX_SPANS]
    rows = [row for row in STRIPS if any(action[row] for action in actions)]
    return [_strip(row, actions, scales.largest[row]) for row in rows]


def _strip(row: str, actions: Sequence[Mapping[str, Any]], largest: float) -> Strip:
    width = 100 / (actions[-1]["start"] + actions[-1]["length"])
    paths: dict[bool, list[str]] = {True: [], False: []}
    for action in actions:
        height = 10 * (action[row] or 0.0) / largest
        left, right = (action["start"] * width, (action["start"] + action["length"]) * width)
        gap = min(0.3, (right - left) / 4)
        corner = f"M{left + gap:.2f} 10V{10 - height:.2f}H{right - gap:.2f}V10Z"
        paths[height > 0].append(corner)
    return Strip(
        label={"kl": "KL"}.get(row, row),
        top=f"\N{PLUS-MINUS SIGN}{number(float(f'{largest:.2g}'))}",
        gains="".join(paths[True]),
        losses="".join(paths[False]),
    )


def signed(value: float | None) -> str:
    """Write a number with its sign and three digits."""
    if value is None:
        return "-"
    sign = "\N{MINUS SIGN}" if value < 0 else "+"
    return sign + number(abs(float(f"{value:.3g}")))
