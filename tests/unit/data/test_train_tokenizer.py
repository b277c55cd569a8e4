import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.data.train_tokenizer import CHATML, package_sentencepiece, train_tokenizer

TOOL = Path(__file__).parents[3] / "tools" / "train_tokenizer.py"
TEXTS = [
    "",
    " ",
    " leading",
    "   three  and two ",
    "a\nb\n\n  c\t d",
    "    total += width  # aaaaa aaaaaaa",
    "smile \U0001f600\U0001f469\u200d\U0001f680 Caf\u00e9 \u6f22\u5b57 \u0627",
    "never seen: \u00df\u0142\u221e\u0000\u007f",
    "aaaaaaaaaaaaa bbbbbbbb aabaab",
    "\u2581 is the blank of the vocabulary",
]
LOAD_WITH_TRANSFORMERS = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True)
texts = json.load(sys.stdin)
ids = [tokenizer.encode(text) for text in texts]
decoded = [tokenizer.decode(row) for row in ids]
special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id,
           tokenizer.unk_token_id]
json.dump([ids, decoded, special], sys.stdout)
"""


def load_sentencepiece(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_transformers_gives_the_same_ids_and_text_as_sentencepiece(code_folder: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", LOAD_WITH_TRANSFORMERS, str(code_folder)],
        input=json.dumps(TEXTS),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    ids, decoded, special = json.loads(process.stdout)
    assert ids == load_sentencepiece(code_folder).encode(TEXTS)
    assert decoded[:-1] == TEXTS[:-1]
    assert special == [0, 1, 2, 3]


@given(st.text(alphabet=" \n\tabdeirth=.()\u00e9\u6f22\U0001f600", max_size=40))
@example("aaaaaaaaa aaaaaaa")
def test_both_libraries_give_the_same_ids(code_folder: Path, text: str) -> None:
    ids = load_sentencepiece(code_folder).encode(text)
    tokenizer = Tokenizer.load(code_folder)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_concatenated_ids_decode_to_concatenated_texts(code_folder: Path) -> None:
    tokenizer = Tokenizer.load(code_folder)
    parts = ["def f():\n", "    return 1", " # one", "x"]
    ids = [index for part in parts for index in tokenizer.encode(part)]
    assert tokenizer.decode(ids) == "".join(parts)


def test_training_twice_gives_the_same_files(tmp_path: Path) -> None:
    texts = ["one two three", "two three four"] * 10
    for name in ("first", "second"):
        train_tokenizer(texts, tmp_path / name, vocab_size=275)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for name in names:
        first, second = (tmp_path / run / name for run in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def train_plain(folder: Path, **options: object) -> None:
    """Train with sentencepiece itself, as the models of other projects are."""
    folder.mkdir(exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "the dog sat"] * 20),
        model_writer=model,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def test_a_model_with_a_dummy_prefix_is_packaged_exactly(tmp_path: Path) -> None:
    options = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 290}
    train_plain(
        tmp_path, normalization_rule_name="identity", remove_extra_whitespaces=False, **options
    )
    package_sentencepiece(tmp_path)
    plain = load_sentencepiece(tmp_path)
    packaged = Tokenizer.load(tmp_path)
    assert packaged.vocab_size == 290
    assert (packaged.pad_id, packaged.eos_id, packaged.bos_id) == (2, 2, 1)  # it has no padding
    for text in ["the cat", " the cat", "   the  dog ", "\nx", "\U0001f600 cat"]:
        assert packaged.encode(text) == plain.encode(text)
        assert packaged.decode(plain.encode(text)) == text


def test_a_unigram_model_is_not_packaged(tmp_path: Path) -> None:
    train_plain(tmp_path, model_type="unigram", vocab_size=16)
    with pytest.raises(
        ValueError, match=r"tokenizer.model: must be BPE .*found: model type is not"
    ):
        package_sentencepiece(tmp_path)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["some text"], 260, "vocab_size=260: must be larger than 260"),
        (["some text"], 5000, r"vocab_size=5000: must suit the text; Vocabulary size too high"),
        ([], 300, r"vocab_size=300: must suit the text; there is no text\. Change"),
    ],
)
def test_a_vocabulary_that_does_not_suit_the_text_is_refused(
    tmp_path: Path, texts: list[str], vocab_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        train_tokenizer(texts, tmp_path / "out", vocab_size=vocab_size)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(TOOL.parents[1])}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )


def test_the_tool_trains_on_fields_of_data_files(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"prompt": "one two", "response": "three four", "other": 1}\n' * 20)
    result = run_tool(tmp_path / "out", "--vocab-size", 275, "--fields", "prompt", data)
    assert result.returncode == 0, result.stderr
    assert Tokenizer.load(tmp_path / "out").vocab_size == 275


def test_the_tool_reports_a_missing_field_in_one_line(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "one"}\n')
    result = run_tool(tmp_path / "out", "--vocab-size", 300, data)
    assert result.returncode == 2
    expected = (
        f"{data}:1: must have text in one of prompt, response, chosen, rejected, messages; the row "
        "has the fields: text. Use --fields.\n"
    )
    assert result.stderr == expected


def test_files_of_several_kinds_train_one_tokenizer(tmp_path: Path) -> None:
    """Alphabets tell which fields have been read; a byte would do for what was not."""
    talk = [{"role": "user", "content": "\u03b1\u03b2"}]
    write_jsonl(tmp_path / "demos.jsonl", [{"prompt": "word " * 200, "response": "\u0436 other"}])
    write_jsonl(tmp_path / "pairs.jsonl", [{"chosen": "\u05d0", "rejected": "\u05d1"}])
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": talk}])
    files = [tmp_path / f"{name}.jsonl" for name in ("demos", "pairs", "chats")]
    assert run_tool(tmp_path / "tok", "--vocab-size", 275, *files).returncode == 0
    tokenizer = Tokenizer.load(tmp_path / "tok")
    assert [len(tokenizer.encode(char)) for char in "\u0436\u05d0\u05d1\u03b1\u03b2"] == [1] * 5


def test_a_chat_template_brings_its_control_tokens(tmp_path: Path) -> None:
    texts = ["Hello Ann, the end. user assistant"] * 20
    train_tokenizer(texts, tmp_path, vocab_size=280, chat_template=CHATML)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.encode("<|im_start|>"), tokenizer.encode("<|im_end|>")) == ([4], [5])
    assert (tokenizer.turn_end.id, tokenizer.end_ids) == (5, (2, 5))
    chat = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat)
    assert text == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    library = AutoTokenizer.from_pretrained(tmp_path)
    found = library.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    assert tokenizer.encode(text) == found["input_ids"]


def test_a_template_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}])
    arguments = ("--vocab-size", 275, "--chat-template", "gone.jinja", tmp_path / "a.jsonl")
    done = run_tool(tmp_path / "tok", *arguments)
    assert done.returncode == 2
    assert done.stderr == (
        "--chat-template=gone.jinja: must be chatml or a file; not found. Give one.\n"
    )
