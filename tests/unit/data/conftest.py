from pathlib import Path

import pytest

from marlhf_mega.data import toy
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.data.train_tokenizer import train_tokenizer

PROGRAM = """def area(width, height):
    total = 0
    for row in range(height):
        total += width * row
    return total  # aaaa bbbb aaaaaa
"""


@pytest.fixture(scope="session")
def code_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packaged SentencePiece model with pieces of several blanks and of repeated letters."""
    folder = tmp_path_factory.mktemp("code_tokenizer")
    texts = [PROGRAM * 3, "a aa aaa aaaa aaaaa", "        x = 1", "Caf\u00e9 \u6f22\u5b57"] * 20
    train_tokenizer(texts, folder, vocab_size=360)
    return folder


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy_tokenizer")
    train_tokenizer(toy.tokenizer_text(0), folder, vocab_size=512)
    return folder


@pytest.fixture(scope="session")
def toy_tokenizer(toy_folder: Path) -> Tokenizer:
    return Tokenizer.load(toy_folder)
