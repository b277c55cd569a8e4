import json
from pathlib import Path

import pytest

from marlhf_mega.data.datasets import ExampleBuilder
from marlhf_mega.data.tokenizer import Tokenizer

ROW = {"prompt": "I love the red lamp.", "response": " Hi Anna!", "source": "x"}


def builder(tokenizer: Tokenizer, **changes: object) -> ExampleBuilder:
    limits = {"max_prompt_tokens": 8, "max_response_tokens": 6, "long_prompts": "error"}
    return ExampleBuilder(tokenizer=tokenizer, source="train.jsonl", **limits | changes)


@pytest.fixture(scope="module")
def chat_tokenizer(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The toy vocabulary with a chat template and a begin-of-sequence token for every text."""
    folder = tmp_path_factory.mktemp("chat")
    layout = json.loads((toy_folder / "tokenizer.json").read_text())
    layout["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(layout))
    config = json.loads((toy_folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "<s>{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder)


def test_the_loss_counts_the_response_and_its_end(toy_tokenizer: Tokenizer) -> None:
    (example,) = builder(toy_tokenizer).supervised([ROW])
    prompt_ids = toy_tokenizer.encode("I love the red lamp.")
    response_ids = [*toy_tokenizer.encode(" Hi Anna!"), toy_tokenizer.eos_id]
    assert example.sequence == prompt_ids + response_ids
    counted = zip(example.sequence, example.response_mask, strict=True)
    assert [index for index, counts in counted if counts] == response_ids


def test_an_empty_prompt_needs_a_token_in_front(
    toy_tokenizer: Tokenizer, chat_tokenizer: Tokenizer
) -> None:
    """With nothing to predict the first token from, there is no response."""
    rows = [ROW, ROW | {"prompt": ""}]
    assert [p.prompt_ids for p in builder(chat_tokenizer).prompts(rows)][1] == [1]
    with pytest.raises(ValueError, match="must have at least one token") as caught:
        builder(toy_tokenizer).prompts(rows)
    assert str(caught.value) == (
        "train.jsonl: the prompt of row 2 must have at least one token; it is empty, and this "
        "tokenizer puts none in front. Write a prompt, or drop the row."
    )


def test_preferences_and_offline_rows_keep_their_numbers(toy_tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": "I", "chosen": " love", "rejected": " put", "margin": 2},
        {"prompt": "I", "chosen": " love", "rejected": ""},
    ]
    first, second = builder(toy_tokenizer).preferences(rows)
    assert first.chosen_ids == [*toy_tokenizer.encode(" love"), 2]
    assert second.rejected_ids == [2]
    assert (first.margin, second.margin) == (2.0, 0.0)
    (example,) = builder(toy_tokenizer).offline([ROW | {"reward": -1}])
    assert example.reward == -1.0
    assert example.response_ids[-1] == 2


def test_prompts_keep_their_row_for_reward_rules(toy_tokenizer: Tokenizer) -> None:
    (prompt,) = builder(toy_tokenizer).prompts([ROW])
    assert prompt.prompt == "I love the red lamp."
    assert prompt.row["source"] == "x"


def test_chats_use_the_template_and_texts_the_prompt_prefix(chat_tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "I love"}]
    text, rendered = builder(chat_tokenizer).prompts([{"prompt": "I love"}, {"prompt": chat}])
    words = chat_tokenizer.encode("I love")
    assert text.prompt_ids == [1, *words]
    assert rendered.prompt_ids == [1, *words, 2]
    assert rendered.prompt == "<s>I love</s>"


def test_a_long_prompt_is_an_error_that_names_its_row(toy_tokenizer: Tokenizer) -> None:
    message = (
        r"data.max_prompt_tokens=3: must hold every prompt; row 2 of train.jsonl has 6 tokens\. "
        r"Raise it, or set data.long_prompts to drop or truncate\."
    )
    with pytest.raises(ValueError, match=message):
        builder(toy_tokenizer, max_prompt_tokens=3).prompts([{"prompt": "I love"}, ROW])


def test_long_prompts_are_dropped_with_their_responses_and_counted(
    toy_tokenizer: Tokenizer,
) -> None:
    build = builder(toy_tokenizer, max_prompt_tokens=3, long_prompts="drop")
    (kept,) = build.supervised([ROW, {"prompt": "I", "response": " love"}, ROW])
    assert kept.response_ids == [*toy_tokenizer.encode(" love"), 2]
    assert str(build.report) == (
        "1 rows, 2 dropped (prompt too long), 0 prompts truncated, 0 responses truncated"
    )


def test_dropping_every_row_is_an_error(toy_tokenizer: Tokenizer) -> None:
    build = builder(toy_tokenizer, max_prompt_tokens=3, long_prompts="drop")
    message = r"data.max_prompt_tokens=3: must leave at least one row of train.jsonl; all 2 were"
    with pytest.raises(ValueError, match=message):
        build.prompts([ROW, ROW])


def test_a_truncated_prompt_keeps_its_end(toy_tokenizer: Tokenizer) -> None:
    build = builder(toy_tokenizer, max_prompt_tokens=3, long_prompts="truncate")
    (prompt,) = build.prompts([ROW])
    assert prompt.prompt_ids == toy_tokenizer.encode(" red lamp.")
    assert build.report.num_truncated_prompts == 1


def test_a_truncated_prompt_keeps_its_first_special_token(chat_tokenizer: Tokenizer) -> None:
    for limit, kept in ((3, [1, *chat_tokenizer.encode(" lamp.")]), (1, [1])):
        build = builder(chat_tokenizer, max_prompt_tokens=limit, long_prompts="truncate")
        assert build.prompts([ROW])[0].prompt_ids == kept


def test_a_long_response_loses_its_end_and_is_counted(toy_tokenizer: Tokenizer) -> None:
    build = builder(toy_tokenizer, max_response_tokens=4)
    words = toy_tokenizer.encode(" I love the red lamp")
    fits, cut = build.supervised(
        [
            {"prompt": "I", "response": " I love the"},
            {"prompt": "I", "response": " I love the red lamp"},
        ]
    )
    assert fits.response_ids == [*words[:3], 2]
    assert cut.response_ids == words[:4]
    assert build.report.num_truncated_responses == 1
