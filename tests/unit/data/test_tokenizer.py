import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from marlhf_mega.data.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANY_TEXT = st.text(alphabet=" \n\tabdeirth=.()\u00e9\u6f22\U0001f600", max_size=40)


def write_byte_level_folder(folder: Path, **config: object) -> Path:
    """Write a folder as byte-level model families ship it, with a begin-of-sequence token."""
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the cat sat on the mat.\n", "caf\u00e9 \u6f22\u5b57"] * 9, trainer
    )
    tokenizer.add_tokens(["<tool>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>"}
    settings |= {"eos_token": "<|end|>", "chat_template": TEMPLATE} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_byte_level_folder(tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def sentencepiece_file(code_folder: Path) -> Tokenizer:
    return Tokenizer.load(code_folder / "tokenizer.model")


@given(ANY_TEXT)
def test_byte_level_text_survives_and_offsets_are_those_of_the_library(
    byte_level: Tokenizer, text: str
) -> None:
    library = byte_level._backend._fast.encode(text, add_special_tokens=False)
    assert byte_level.encode(text) == library.ids
    assert byte_level.decode(library.ids) == text
    assert byte_level.offsets(library.ids) == library.offsets


@given(ANY_TEXT, st.randoms(use_true_random=False))
def test_offsets_are_the_characters_that_a_token_has_bytes_of(
    sentencepiece_file: Tokenizer, text: str, random: object
) -> None:
    ids = sentencepiece_file.encode(text)
    assert sentencepiece_file.decode(ids) == text
    piece_bytes = [sentencepiece_file._backend.token_bytes[index] for index in ids]
    expected, before, after = [], b"", b"".join(piece_bytes)
    for piece in piece_bytes:
        before, after = before + piece, after[len(piece) :]
        start = len(before[: len(before) - len(piece)].decode(errors="ignore"))
        expected.append((start, len(text) - len(after.decode(errors="ignore"))))
    assert sentencepiece_file.offsets(ids) == expected


def test_offsets_by_hand(toy_tokenizer: Tokenizer) -> None:
    ids = [1, *toy_tokenizer.encode("Hi Anna!\n\U0001f600 I"), 2]
    assert toy_tokenizer.decode(ids) == "Hi Anna!\n\U0001f600 I"
    emoji = [(9, 10)] * 4
    expected = [(0, 0), (0, 2), (2, 7), (7, 8), (8, 9), *emoji, (10, 12), (12, 12)]
    assert toy_tokenizer.offsets(ids) == expected


@given(st.lists(st.integers(0, 359), max_size=30))
def test_offsets_cover_the_text_of_any_ids(sentencepiece_file: Tokenizer, ids: list[int]) -> None:
    text, spans = sentencepiece_file.decode(ids), sentencepiece_file.offsets(ids)
    assert len(spans) == len(ids)
    position = 0
    for start, end in spans:
        assert position - 1 <= start <= position
        assert end >= start
        position = max(position, end)
    assert position == len(text)


def test_a_dropped_leading_blank_belongs_to_no_character(tmp_path: Path, toy_folder: Path) -> None:
    layout = json.loads((toy_folder / "tokenizer.json").read_text())
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    layout["decoder"]["decoders"].append(strip)
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout))
    config = (toy_folder / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config)
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode(" I love")
    assert tokenizer.decode(ids) == "I love"
    assert tokenizer.offsets(ids) == [(0, 1), (1, 6)]


def test_invalid_bytes_become_replacement_characters(sentencepiece_file: Tokenizer) -> None:
    lone = sentencepiece_file.encode("\U0001f600")[-2:]  # the last two bytes of four
    letter = sentencepiece_file.encode("x")
    assert sentencepiece_file.decode([*lone, *letter]) == "\ufffd\ufffdx"
    assert sentencepiece_file.offsets([*lone, *letter]) == [(0, 1), (1, 2), (2, 3)]
    cut = sentencepiece_file.encode("\U0001f600")[:3]
    assert sentencepiece_file.decode([*cut, *letter]) == "\ufffdx"
    assert sentencepiece_file.offsets([*cut, *letter]) == [(0, 1), (0, 1), (0, 1), (1, 2)]


def test_special_tokens_are_added_only_on_request(byte_level: Tokenizer) -> None:
    plain = byte_level.encode("the cat")
    assert byte_level.prompt_prefix == [0]
    assert byte_level.decode([0, *plain, 1]) == "the cat"


def test_added_tokens_that_are_not_special_are_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<tool>b")
    assert len(ids) == 3
    assert byte_level.decode(ids) == "a<tool>b"


def test_padding_falls_back_to_the_end_of_sequence(
    byte_level: Tokenizer, toy_tokenizer: Tokenizer
) -> None:
    assert (byte_level.pad_id, byte_level.eos_id, byte_level.bos_id) == (1, 1, 0)
    assert (toy_tokenizer.pad_id, toy_tokenizer.eos_id, toy_tokenizer.bos_id) == (0, 2, 1)
    assert byte_level.vocab_size == 281
    assert toy_tokenizer.vocab_size == 512


def test_a_model_file_and_its_package_are_the_same_vocabulary(
    code_folder: Path, sentencepiece_file: Tokenizer, byte_level: Tokenizer
) -> None:
    assert sentencepiece_file.fingerprint() == Tokenizer.load(code_folder).fingerprint()
    assert sentencepiece_file.fingerprint() != byte_level.fingerprint()
    # A bare model says nothing of <s>, and such models are trained with it.
    assert Tokenizer.load(code_folder).prompt_prefix == sentencepiece_file.prompt_prefix == []


def test_a_bare_model_file_starts_prompts_with_bos(code_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes((code_folder / "tokenizer.model").read_bytes())
    assert Tokenizer.load(tmp_path / "x.model").prompt_prefix == [1]


def test_sentence_ends_ignore_quotes_brackets_and_blanks(tmp_path: Path) -> None:
    ends = [".", "!", "?", '."', "\n", "\n  ", "?)", "...", "yes.", "!\u201d ]"]
    others = ["a", ",", " ", ")", ".5", ". x", '"', "-", ";"]
    folder = write_byte_level_folder(tmp_path)
    fast = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_tokens([f"{text}" for text in [*ends, *others] if len(text) > 1])
    fast.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    found = {text: tokenizer.ends_sentence[tokenizer.encode(text)[-1]] for text in [*ends, *others]}
    assert {text for text, is_end in found.items() if is_end} == set(ends)
    clauses = tokenizer.ends_clause()
    found = {text: clauses[tokenizer.encode(text)[-1]] for text in [*ends, *others]}
    assert {text for text, is_end in found.items() if is_end} == {*ends, ",", ";"}
    assert not tokenizer.ends_sentence[tokenizer.eos_id]


def test_chats_go_through_the_template_up_to_the_next_turn(byte_level: Tokenizer) -> None:
    text = byte_level.apply_chat_template([{"role": "user", "content": " hi"}])
    assert text == "<|user|> hi<|end|><|assistant|>"
    assert byte_level.encode(text).count(byte_level.eos_id) == 1


def test_a_template_that_refuses_the_messages_is_an_error(byte_level: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"prompt: must suit .* which reports: no system turns"):
        byte_level.apply_chat_template([{"role": "system", "content": "x"}])


def test_chats_without_a_template_are_an_error(
    toy_tokenizer: Tokenizer, sentencepiece_file: Tokenizer
) -> None:
    for tokenizer in (toy_tokenizer, sentencepiece_file):
        with pytest.raises(
            ValueError, match=r"prompt: must be text, as this tokenizer has no chat_template"
        ):
            tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])


def edit_decoder(folder: Path) -> None:
    write_byte_level_folder(folder)
    layout = json.loads((folder / "tokenizer.json").read_text())
    layout["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (folder / "tokenizer.json").write_text(json.dumps(layout))


def edit_model(folder: Path) -> None:
    write_byte_level_folder(folder)
    layout = json.loads((folder / "tokenizer.json").read_text())
    layout["model"] = {"type": "FromTheFuture"}
    (folder / "tokenizer.json").write_text(json.dumps(layout))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.rmdir(), "must exist; not found"),
        (lambda folder: None, "must hold tokenizer.json or tokenizer.model; found neither"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "json must be readable; Exp"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "json must be readable; "),
        (edit_model, "tokenizer.json must be readable; "),
        (lambda folder: (folder / "tokenizer.model").write_text("x"), "must be a SentencePiece"),
        (edit_decoder, r"must decode bytes .* declares the decoder WordPiece\."),
        (
            lambda folder: write_byte_level_folder(folder, eos_token=None),
            "must have an end-of-sequence token; none is declared",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_one_line(
    tmp_path: Path, make: object, message: str
) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(folder)
    assert str(caught.value).startswith(f"tokenizer.path={folder}: ")
    assert "\n" not in str(caught.value)


def declare(path: Path, **values: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values))


def test_every_declared_end_token_is_one(tmp_path: Path) -> None:
    """A chat ends its turns with `<|end|>`, id 1; `<|begin|>` is 0, `<tool>` 280 and no token."""
    folder, model = write_byte_level_folder(tmp_path), tmp_path / "model"
    assert Tokenizer.load(folder).end_ids == (1,)
    declare(folder / "config.json", eos_token_id=7)
    assert Tokenizer.load(folder).end_ids == (1, 7)
    declare(folder / "generation_config.json", eos_token_id=[1, 280])
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.end_ids == (1, 280)
    assert tokenizer.decode([*tokenizer.encode("a"), 280]) == "a"
    # The model's ids are taken where this vocabulary has control tokens there.
    declare(model / "generation_config.json", eos_token_id=[5, 0])
    assert Tokenizer.load(folder, model=model).end_ids == (1, 280, 0)
    stopped = Tokenizer.load(folder, stop=(9, "<|begin|>", "\nUser:"))
    assert (stopped.end_ids, stopped.stop_texts) == ((1, 280, 9, 0), (b"\nUser:",))
    with pytest.raises(
        ValueError, match=r"rollout.stop=281: must be an id of the tokenizer, below"
    ):
        Tokenizer.load(folder, stop=(281,))
    declare(folder / "generation_config.json", eos_token_id="</s>")
    with pytest.raises(ValueError, match=r"eos_token_id must be an id or a list of ids; it is"):
        Tokenizer.load(folder)


def test_the_prompt_fingerprint_knows_what_changes_prompts(tmp_path: Path) -> None:
    one = Tokenizer.load(write_byte_level_folder(tmp_path))
    assert Tokenizer.load(tmp_path).prompt_fingerprint() == one.prompt_fingerprint()
    others = [Tokenizer.load(write_byte_level_folder(tmp_path, chat_template=TEMPLATE + " "))]
    write_byte_level_folder(tmp_path)
    declare(tmp_path / "generation_config.json", eos_token_id=9)
    others.append(Tokenizer.load(tmp_path))
    (tmp_path / "generation_config.json").unlink()
    layout = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout | {"post_processor": None}))
    others.append(Tokenizer.load(tmp_path))
    for other in others:
        assert other.fingerprint() == one.fingerprint()
    assert len({t.prompt_fingerprint() for t in [one, *others]}) == 4


def test_the_end_token_of_a_response_can_be_shown(toy_tokenizer: Tokenizer) -> None:
    words = toy_tokenizer.encode("the end")
    assert toy_tokenizer.end_text([*words, toy_tokenizer.eos_id]) == "</s>"
    assert toy_tokenizer.end_text(words) is None
    assert toy_tokenizer.end_text([]) is None


def test_rules_see_special_tokens_only_if_asked(tmp_path: Path) -> None:
    folder = write_byte_level_folder(tmp_path)
    ids = Tokenizer.load(folder).encode("a<|begin|>b<|end|>")
    assert Tokenizer.load(folder).response_text(ids) == "ab"
    kept = Tokenizer.load(folder, keep_special=True)
    assert kept.response_text(ids) == "a<|begin|>b"
    assert kept.response_text(ids[:-1]) == "a<|begin|>b"
    assert kept.decode(ids) == "ab"


@pytest.mark.parametrize(
    ("file", "values", "problem"),
    [
        ("added_tokens.json", {"<tool>": 360}, "'<tool>', id 360"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"360": {"content": "<|im_end|>"}}, "eos_token": "<|im_end|>"},
            "'<|im_end|>', id 360, eos_token '<|im_end|>'",
        ),
        ("special_tokens_map.json", {"bos_token": {"content": "<x>"}}, "bos_token '<x>'"),
    ],
)
def test_a_sentencepiece_folder_that_says_more_than_its_model_is_refused(
    code_folder: Path, tmp_path: Path, file: str, values: dict[str, object], problem: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((code_folder / "tokenizer.model").read_bytes())
    same = {"added_tokens_decoder": {"2": {"content": "</s>"}}, "eos_token": "</s>"}
    declare(tmp_path / "tokenizer_config.json", **same)
    assert Tokenizer.load(tmp_path).eos_id == 2
    declare(tmp_path / file, **values)
    with pytest.raises(ValueError, match="must hold tokenizer.json") as caught:
        Tokenizer.load(tmp_path)
    assert f"what tokenizer.model lacks; {problem}. Save" in str(caught.value)
    assert Tokenizer.load(tmp_path / "tokenizer.model").eos_id == 2


def test_another_vocabulary_is_told_by_its_first_other_token(
    byte_level: Tokenizer, sentencepiece_file: Tokenizer, code_folder: Path
) -> None:
    assert sentencepiece_file.difference(Tokenizer.load(code_folder)) is None
    assert byte_level.difference(sentencepiece_file) == "id 0 is '<pad>' there and '<|begin|>' here"
