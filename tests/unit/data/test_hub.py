"""Data sets of the Hub: names, and what is said where they cannot be loaded."""

import sys
from types import SimpleNamespace

import pytest

from marlhf_mega.data.files import content_hash, read_rows, write_jsonl


@pytest.fixture
def asked(monkeypatch):
    """Replace `datasets` by a module that notes what it is asked for."""
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((*arguments, *options.values()))
        if "gone" in arguments[0]:
            raise FileNotFoundError("no such data set.\nmore")
        return [{"prompt": "a", "reward": None, "id": None}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("path", "call"),
    [
        ("hf://org/name:train", ("org/name", None, "train")),
        ("hf://name:train[:10%]", ("name", None, "train[:10%]")),
        ("hf://org/name/en:test", ("org/name", "en", "test")),
        ("hf:///data/set:train", ("/data/set", None, "train")),
        ("hf://./set/a/b:train", ("./set/a/b", None, "train")),
    ],
)
def test_names_subsets_and_splits(asked, path, call):
    assert read_rows(path, "prompts") == [{"prompt": "a", "reward": None}]
    assert asked == [call]


def test_what_cannot_be_loaded_is_one_line(asked):
    with pytest.raises(ValueError, match="gone") as caught:
        read_rows("hf://org/gone:train", "prompts")
    assert str(caught.value) == (
        "hf://org/gone:train: must be a data set that datasets can load; no such data set. Check "
        "its name, its split and the network, or give a .jsonl or .parquet file."
    )
    with pytest.raises(ValueError, match="its split is missing. Write for example :train"):
        read_rows("hf://org/name", "prompts")


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the library datasets; .*pip install 'marlhf-mega"):
        read_rows("hf://org/name:train", "prompts")


def test_a_folder_is_read_by_the_library(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", rows)
    path = f"hf://{tmp_path / 'set'}:train"
    assert read_rows(path, "sft") == rows
    assert content_hash(path) == content_hash(path)
