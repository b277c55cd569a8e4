import random
import statistics

import pytest

from marlhf_mega.data import toy
from marlhf_mega.data.tokenizer import Tokenizer

PROMPT = (
    "Write a warm note to Anna about the red lamp, the old book and the hot soup. "
    "Meet by the river.\n"
)
GOOD = (
    "Hi Anna! I love the red lamp and the old book. Do you still have the hot soup? "
    "Let us meet by the river. Lots of love!"
)
W = toy.WEIGHTS


def test_a_perfect_note_earns_one() -> None:
    assert sum(W.values()) == pytest.approx(1.0)
    assert toy.gold_reward(PROMPT, GOOD, id=3) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("old", "new", "lost"),
    [
        ("Hi Anna!", "Hello Anna!", W["greeting"]),
        ("Hi Anna!", "Hi Ben!", W["greeting"]),
        ("Lots of love!", "Kind regards.", W["closing"]),
        (" Lots of love!", "", W["closing"]),
        # One pair of neighbours in the wrong order.
        ("the red lamp and the old book", "the old book and the red lamp", W["order"] / 2),
        # One of four phrases; the other pair stays in order; 1 of 5 sentences is off topic.
        (
            "the hot soup",
            "the green hat",
            W["coverage"] / 4 + W["order"] / 2 + W["clean"] * (1 - 0.75 * 4 / 5),
        ),
        # The same sentence again: 5 of 6 sentences are new.
        ("Let us", "I love the red lamp and the old book. Let us", W["clean"] / 6),
        # Requested things in another sentence are a repetition as well.
        ("Let us", "We all like the red lamp. Let us", W["clean"] / 6),
        # Twice in one sentence is a repetition too: 4 of 5. Coverage and order stay.
        (
            "Do you still have the hot soup?",
            "Do you have the hot soup and the hot soup?",
            W["clean"] / 5,
        ),
        # Not a sentence of the task: 4 of 5.
        ("Do you still have the hot soup?", "You the the hot soup?", W["clean"] / 5),
    ],
)
def test_every_mistake_costs_its_share(old: str, new: str, lost: float) -> None:
    assert old in GOOD
    assert toy.gold_reward(PROMPT, GOOD.replace(old, new)) == pytest.approx(1.0 - lost)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0.0),
        ("   \n", 0.0),
        ("Lots of love!", W["closing"]),
        ("Hi Anna!", W["greeting"]),
        ("the red lamp " * 20, W["coverage"] / 4),
        ("I love " + " and ".join(toy.THINGS) + ".", W["coverage"] * 3 / 4 + W["order"]),
    ],
)
def test_neither_silence_nor_length_pays(response: str, expected: float) -> None:
    assert toy.gold_reward(PROMPT, response) == pytest.approx(expected)


def test_any_sentence_added_to_a_perfect_note_costs_something() -> None:
    rows = [row for row in toy.generate_sft(0, 2000) if toy.gold_reward(**row) > 0.99]
    rng = random.Random(0)
    for row in rows:
        extra = rng.choice(rows)["response"].split(". ")[1] + "."
        for longer in (f"{row['response']} {extra}", f"{extra} {row['response']}"):
            assert toy.gold_reward(row["prompt"], longer) < 0.97


def test_requests_survive_their_prompt() -> None:
    request = toy.NoteRequest.parse(PROMPT)
    assert request == toy.NoteRequest(
        tone="warm",
        name="Anna",
        things=("the red lamp", "the old book", "the hot soup"),
        place="by the river",
    )
    assert request.prompt() == PROMPT
    assert all(
        toy.NoteRequest.parse(row["prompt"]).prompt() == row["prompt"]
        for row in toy.generate_prompts(0, 200)
    )


def test_a_foreign_prompt_is_an_error() -> None:
    with pytest.raises(ValueError, match="prompt='Hello': must be a prompt of the built-in task"):
        toy.gold_reward("Hello", "Hi")


def test_data_is_a_function_of_the_seed() -> None:
    for generate in (toy.generate_sft, toy.generate_preferences, toy.generate_prompts):
        assert generate(5, 20) == generate(5, 20)
        assert generate(5, 20) != generate(6, 20)
        assert generate(5, 20, held_out=True) != generate(5, 20)


def test_held_out_prompts_are_never_trained_on() -> None:
    kinds = (toy.generate_sft, toy.generate_preferences, toy.generate_prompts)
    train = {row["prompt"] for generate in kinds for row in generate(0, 2000)}
    held_out = {row["prompt"] for generate in kinds for row in generate(1, 500, held_out=True)}
    assert not train & held_out


def test_demonstrations_leave_room_to_improve() -> None:
    rewards = [toy.gold_reward(**row) for row in toy.generate_sft(0, 1000)]
    assert 0.55 < statistics.mean(rewards) < 0.75
    assert sum(reward > 0.99 for reward in rewards) > 20


def test_preferences_follow_the_gold_reward_with_a_little_noise() -> None:
    rows = toy.generate_preferences(0, 1000)
    gains = [
        toy.gold_reward(row["prompt"], row["chosen"])
        - toy.gold_reward(row["prompt"], row["rejected"])
        for row in rows
    ]
    assert min(map(abs, gains)) >= 0.15 - 1e-9
    assert 0.005 < sum(gain < 0 for gain in gains) / len(gains) < 0.04
    assert all(
        toy.gold_reward(row["prompt"], row["chosen"])
        > toy.gold_reward(row["prompt"], row["rejected"])
        for row in toy.generate_preferences(0, 100, flip_probability=0.0)
    )


def test_a_longer_note_is_not_preferred_by_rule() -> None:
    rows = toy.generate_preferences(0, 2000)
    longer = [len(row["chosen"]) > len(row["rejected"]) for row in rows]
    assert sum(longer) / len(longer) < 0.75


def test_token_counts_stay_below_the_documented_limits(toy_tokenizer: Tokenizer) -> None:
    rows = toy.generate_sft(1, 3000)
    prompts = toy_tokenizer.encode_batch([row["prompt"] for row in rows])
    responses = toy_tokenizer.encode_batch([row["response"] for row in rows])
    assert max(map(len, prompts)) <= 32
    assert max(map(len, responses)) < 48  # the end token comes behind
    pairs = toy.generate_preferences(1, 3000)
    notes = [row[name] for row in pairs for name in ("chosen", "rejected")]
    assert max(map(len, toy_tokenizer.encode_batch(notes))) < 48
    assert toy_tokenizer.vocab_size == 512
