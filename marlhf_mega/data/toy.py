"""The built-in language task: short notes that must mention what the prompt asks for.

A prompt names a tone, a person, two or three things and a meeting place. A good note greets in
that tone, mentions every thing in full and in the requested order, names the place, and closes in
that tone, without repetition. All of this can be checked exactly, so the gold reward is known:

    Write a warm note to Anna about the red lamp and the old book. Meet by the river.
    -> Hi Anna! I love the red lamp and the old book. Let us meet by the river. Lots of love!

The SFT demonstrations are noisy on purpose: a model that imitates them earns about half of the
reward, which leaves reinforcement learning room to improve.
"""

import hashlib
import itertools
import random
import re
from dataclasses import dataclass

NAMES = ("Anna", "Ben", "Cara", "Dan", "Ella", "Finn", "Gus", "Hana")
THINGS = (
    "the red lamp",
    "the old book",
    "the big cake",
    "the blue boat",
    "the tiny ring",
    "the soft song",
    "the dark tree",
    "the new door",
    "the fine kite",
    "the cold drum",
    "the long coat",
    "the hot soup",
    "the green hat",
    "the round map",
)
PLACES = (
    "by the river",
    "at the market",
    "in the park",
    "near the school",
    "at the lake",
    "in the town",
    "by the bridge",
    "near the hill",
)
GREETINGS = {"warm": "Hi {name}!", "polite": "Good day, {name}.", "jolly": "Hello {name}!"}
CLOSINGS = {"warm": "Lots of love!", "polite": "Kind regards.", "jolly": "Have fun!"}
ONE_THING = (
    "I love {a}.",
    "Thank you for {a}.",
    "We all like {a}.",
    "Do you still have {a}?",
)
TWO_THINGS = (
    "I love {a} and {b}.",
    "We have {a} near {b}.",
    "Thank you for {a} and {b}.",
    "Do you have {a} and {b}?",
)
MEETING = ("Let us meet {place}.", "See you {place}.", "I will wait {place}.")

WEIGHTS = {"coverage": 0.4, "order": 0.1, "greeting": 0.2, "closing": 0.2, "clean": 0.1}
"""Weights of the parts of the gold reward; they sum to 1."""

HELD_OUT_FRACTION = 0.1
"""Share of all prompts reserved for evaluation, chosen by a hash of the prompt."""


def _alternatives(words: tuple[str, ...]) -> str:
    return "(?:" + "|".join(words) + ")"


_THING = _alternatives(THINGS)
_PROMPT = re.compile(
    rf"Write a (?P<tone>{'|'.join(GREETINGS)}) note to (?P<name>{'|'.join(NAMES)}) about "
    rf"(?P<things>{_THING}(?:(?:, | and ){_THING})*)\. Meet (?P<place>{'|'.join(PLACES)})\.\s*"
)
_PHRASE = re.compile(rf"\b(?:{_THING}|{_alternatives(PLACES)})\b")
_SENTENCE = re.compile(
    _alternatives(
        tuple(
            re.sub(r"[.?]", r"\\\g<0>", template).format(
                a=_THING, b=_THING, place=_alternatives(PLACES), name=_alternatives(NAMES)
            )
            for templates in (GREETINGS.values(), ONE_THING, TWO_THINGS, MEETING, CLOSINGS.values())
            for template in templates
        )
    )
)


@dataclass(frozen=True, kw_only=True)
class NoteRequest:
    """What a prompt asks for."""

    tone: str
    name: str
    things: tuple[str, ...]
    """Two or three noun phrases, in the order in which the note must mention them."""
    place: str

    def prompt(self) -> str:
        """Render the request; the final newline separates it from the response."""
        things = ", ".join(self.things[:-1]) + " and " + self.things[-1]
        return f"Write a {self.tone} note to {self.name} about {things}. Meet {self.place}.\n"

    @classmethod
    def parse(cls, prompt: str) -> "NoteRequest":
        """Read a prompt back.

        Raises:
            ValueError: the text is not a prompt of this task.
        """
        match = _PROMPT.fullmatch(prompt)
        if match is None:
            raise ValueError(
                f"prompt={prompt[:60]!r}: must be a prompt of the built-in task; it does not match "
                "its pattern. Use prompts from generate_prompts."
            )
        return cls(
            tone=match["tone"],
            name=match["name"],
            things=tuple(re.findall(_THING, match["things"])),
            place=match["place"],
        )


def reward_parts(request: NoteRequest, response: str) -> dict[str, float]:
    """Check a note against its request, part by part.

    Returns:
        Values in [0, 1]: `coverage` of the requested phrases, `order` (neighbouring things that
        are both mentioned, in order), `greeting`, `closing`, and `clean`: the share of sentences
        that are well formed, new and on topic, times the coverage so that silence earns nothing.
    """
    wanted = (*request.things, request.place)
    first_mentions = [response.find(phrase) for phrase in wanted]
    coverage = sum(position >= 0 for position in first_mentions) / len(wanted)
    in_order = [0 <= a < b for a, b in itertools.pairwise(first_mentions[:-1])]
    return {
        "coverage": coverage,
        "order": sum(in_order) / len(in_order),
        "greeting": float(response.startswith(GREETINGS[request.tone].format(name=request.name))),
        "closing": float(response.endswith(CLOSINGS[request.tone])),
        "clean": coverage * _clean_share(response, wanted),
    }


def _clean_share(response: str, wanted: tuple[str, ...]) -> float:
    """Compute the share of sentences that are well formed, new, and mention wanted things once."""
    sentences = [text.strip() for text in re.findall(r"[^.!?]+[.!?]?", response) if text.strip()]
    seen: list[str] = []
    num_clean = 0
    for sentence in sentences:
        mentioned = _PHRASE.findall(sentence)
        is_new = sentence not in seen and len({*seen, *mentioned}) == len({*seen}) + len(mentioned)
        is_well_formed = _SENTENCE.fullmatch(sentence) is not None
        num_clean += is_new and is_well_formed and set(mentioned) <= set(wanted)
        seen += [sentence, *mentioned]
    return num_clean / max(len(sentences), 1)


def gold_reward(prompt: str, response: str, **_fields: object) -> float:
    """Compute the exact reward of a note, in [0, 1]; usable as a code reward.

    Raises:
        ValueError: the prompt is not one of this task.
    """
    parts = reward_parts(NoteRequest.parse(prompt), response.strip())
    return sum(WEIGHTS[name] * value for name, value in parts.items())


def generate_prompts(seed: int, n: int, *, held_out: bool = False) -> list[dict[str, str]]:
    """Generate `n` prompt rows; training and held-out prompts never overlap."""
    rng = random.Random(f"prompts-{seed}-{held_out}")
    return [{"prompt": _request(rng, held_out).prompt()} for _ in range(n)]


def generate_sft(seed: int, n: int, *, held_out: bool = False) -> list[dict[str, str]]:
    """Generate `n` demonstrations `{prompt, response}` of deliberately mixed quality."""
    rng = random.Random(f"sft-{seed}-{held_out}")
    requests = [_request(rng, held_out) for _ in range(n)]
    return [{"prompt": r.prompt(), "response": _note(rng, r, noise=1.0)} for r in requests]


def generate_preferences(
    seed: int, n: int, *, held_out: bool = False, flip_probability: float = 0.02
) -> list[dict[str, str]]:
    """Generate `n` preference rows `{prompt, chosen, rejected}` labelled by the gold reward.

    The two notes differ in gold reward by at least 0.15; a share `flip_probability` of the labels
    is wrong, as human labels are.
    """
    rng = random.Random(f"preferences-{seed}-{held_out}")
    rows: list[dict[str, str]] = []
    while len(rows) < n:
        prompt = _request(rng, held_out).prompt()
        notes = [_damaged_note(rng, NoteRequest.parse(prompt)) for _ in range(2)]
        worse, better = sorted(notes, key=lambda note: gold_reward(prompt, note))
        if gold_reward(prompt, better) - gold_reward(prompt, worse) < 0.15:
            continue
        if rng.random() < flip_probability:
            worse, better = better, worse
        rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
    return rows


def tokenizer_text(seed: int, n: int = 2000) -> list[str]:
    """Return prompts and notes to train the task's tokenizer on."""
    return [text for row in generate_sft(seed, n) for text in (row["prompt"], row["response"])]


def _request(rng: random.Random, held_out: bool) -> NoteRequest:
    while True:
        request = NoteRequest(
            tone=rng.choice(tuple(GREETINGS)),
            name=rng.choice(NAMES),
            things=tuple(rng.sample(THINGS, rng.choice((2, 3)))),
            place=rng.choice(PLACES),
        )
        digest = hashlib.sha256(request.prompt().encode()).digest()
        is_held_out = int.from_bytes(digest[:4], "big") < HELD_OUT_FRACTION * 2**32
        if is_held_out == held_out:
            return request


def _body(rng: random.Random, things: list[str]) -> list[str]:
    """Put the things into sentences of one or two, in the given order."""
    sentences = []
    while things:
        if len(things) >= 2 and rng.random() < 0.6:
            template, used = rng.choice(TWO_THINGS), things[:2]
            sentences.append(template.format(a=used[0], b=used[1]))
        else:
            template, used = rng.choice(ONE_THING), things[:1]
            sentences.append(template.format(a=used[0]))
        things = things[len(used) :]
    return sentences


def _note(rng: random.Random, request: NoteRequest, *, noise: float) -> str:
    """Write a note whose every mistake has a probability proportional to `noise` (0: perfect)."""

    def mistake(probability: float) -> bool:
        return rng.random() < noise * probability

    greeting_tone = rng.choice(tuple(GREETINGS)) if mistake(0.6) else request.tone
    closing_tone = rng.choice(tuple(CLOSINGS)) if mistake(0.5) else request.tone
    things = [
        rng.choice(THINGS) if mistake(0.1) else thing
        for thing in request.things
        if not mistake(0.15)
    ]
    if mistake(0.4):
        rng.shuffle(things)
    body = _body(rng, things)
    if not mistake(0.2):
        place = rng.choice(PLACES) if mistake(0.1) else request.place
        body.append(rng.choice(MEETING).format(place=place))
    if body and mistake(0.25):
        body.insert(rng.randrange(len(body)), rng.choice(body))
    closing = [] if mistake(0.15) else [CLOSINGS[closing_tone]]
    return " ".join([GREETINGS[greeting_tone].format(name=request.name), *body, *closing])


def _damaged_note(rng: random.Random, request: NoteRequest) -> str:
    """Write a note of random quality, sometimes with the word errors of a weak language model."""
    words = _note(rng, request, noise=1.5 * rng.random()).split(" ")
    if rng.random() < 0.25:
        for _ in range(rng.choice((1, 2, 3))):
            source, target = rng.randrange(len(words)), rng.randrange(len(words))
            # A word with a punctuation mark is two tokens: copying it could break the length limit.
            if rng.random() < 0.5 and words[source].isalpha():
                words[target] = words[source]
            elif len(words) > 1:
                del words[target]
    return " ".join(words)
