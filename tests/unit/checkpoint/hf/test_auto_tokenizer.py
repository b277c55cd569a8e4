"""Exported tokenizers against transformers in a process of its own."""

import json
import re
import shutil

import pytest

from marlhf_mega.checkpoint.hf.auto_tokenizer import (
    TEXTS,
    fit_auto_tokenizer,
    text_differences,
    warn_of_other_text,
)
from marlhf_mega.data import toy
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.data.train_tokenizer import train_tokenizer
from tests.unit.checkpoint.hf.transfers import run_clean

FAMILIES = ("llama", "mistral", "gemma", "gemma2", "mixtral")
FAMILIES += ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(toy.tokenizer_text(0, 300), folder, vocab_size=400)
    return folder


def make_folder(path, trained, family, *, names=("tokenizer*",), **settings):
    """A model's folder with some of a tokenizer's files, and other settings if there are any."""
    path.mkdir()
    for file in (file for name in names for file in trained.glob(name)):
        shutil.copy(file, path)
    if settings:
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "config.json").write_text(json.dumps({"model_type": family, "vocab_size": 400}))
    return path


def test_transformers_reads_every_familys_export_as_we_do(trained, tmp_path):
    """As a packaged folder, and as the bare model file that a run was given."""
    folders = {}
    for family in FAMILIES:
        folders[f"{family} packaged"] = make_folder(tmp_path / f"{family}_1", trained, family)
        for begins in (False, True):
            name = f"{family} {begins}"
            folders[name] = make_folder(
                tmp_path / name.replace(" ", "_"),
                trained,
                family,
                names=["tokenizer.model"],
                add_bos_token=begins,
            )
    expected = {}
    for name, folder in folders.items():
        given = Tokenizer.load(folder)
        fit_auto_tokenizer(folder)
        ours = Tokenizer.load(folder)
        assert ours.prompt_prefix == given.prompt_prefix == ([1] if "True" in name else [])
        assert ours.fingerprint() == given.fingerprint()
        ids = [given.encode(text) for text in TEXTS]
        assert [ours.encode(text) for text in TEXTS] == ids
        expected[name] = {"ids": ids, "texts": list(TEXTS), "empty": given.prompt_prefix}
    (tmp_path / "questions.json").write_text(
        json.dumps({name: {"folder": str(f), "texts": TEXTS} for name, f in folders.items()})
    )
    found = json.loads(run_clean("read_texts.py", tmp_path / "questions.json"))
    assert found == expected


def test_without_the_change_a_qwen2_folder_is_read_as_another_tokenizer(trained, tmp_path, caplog):
    folder = make_folder(tmp_path / "qwen2", trained, "qwen2")
    ours = Tokenizer.load(folder)
    first, *_ = text_differences(folder, ours)
    assert first.startswith('AutoTokenizer encodes "Plain text, with punctuation')
    there, here = re.search(r" as \[(\d+), .*\]\.\.\., we as \[(\d+), .*\]\.\.\.$", first).groups()
    assert there != here
    warn_of_other_text(folder, ours)
    fit_auto_tokenizer(folder)
    assert list(text_differences(folder, ours)) == []
    warn_of_other_text(folder, ours)
    assert caplog.messages == [f"{folder}: {first}. Use the tokenizer of the run directory."]


def test_what_is_not_read_at_all_is_one_difference(trained, tmp_path):
    folder = make_folder(tmp_path / "broken", trained, "llama")
    ours = Tokenizer.load(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer.model").unlink()
    (difference,) = text_differences(folder, ours)
    assert difference.startswith("AutoTokenizer does not read it: ")
    assert "\n" not in difference


def test_another_begin_of_texts_is_a_difference(trained, tmp_path):
    folder = make_folder(tmp_path / "model", trained, "llama")
    ours = Tokenizer.load(folder)
    ours.prompt_prefix = [1]
    assert list(text_differences(folder, ours)) == [
        "AutoTokenizer begins texts with [], we with [1]"
    ]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_files_that_name_their_class_stay_as_they_are(trained, tmp_path, family):
    """And those of a byte-level tokenizer, which is what a Qwen2 folder should have."""
    names = ["tokenizer.model"] if family == "llama" else []
    declared = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    folder = make_folder(tmp_path / "model", trained, family, names=names, **declared)
    if family == "qwen2":
        (folder / "tokenizer.json").write_text(json.dumps({"decoder": {"type": "ByteLevel"}}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fit_auto_tokenizer(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_model_that_cannot_be_packaged_stays_as_it_is(tmp_path):
    """Another kind than BPE with byte fallback would be split in another way."""
    import sentencepiece

    folder = tmp_path / "unigram"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(toy.tokenizer_text(0, 100)),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=100,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    fit_auto_tokenizer(folder)
    assert [path.name for path in folder.iterdir()] == ["tokenizer.model"]
