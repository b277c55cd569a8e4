"""One tokenizer over Hugging Face fast tokenizers and SentencePiece models.

Both are reduced to the same few facts: how text becomes ids, and which bytes every id stands for.
Decoding, character offsets and sentence ends follow from the byte table alone, so they agree with
each other by construction.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from marlhf_mega.data.tokenizer_backends import (
    HuggingFaceBackend,
    SentencePieceBackend,
    TokenizerLoadError,
)

Messages = Sequence[Mapping[str, str]]
"""A chat: `[{"role": "user", "content": "..."}, ...]`."""

_AFTER_SENTENCE_END = "\"'\u201d\u2019\u00bb)]} \t"


class Backend(Protocol):
    """What a tokenizer library has to provide."""

    pieces: list[str]
    token_bytes: list[bytes]
    special_ids: frozenset[int]
    eos_id: int | None
    bos_id: int | None
    pad_id: int | None
    adds_bos: bool
    strips_leading_blank: bool

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode without adding special tokens."""

    def apply_chat_template(self, messages: Messages) -> str:
        """Render a chat up to where the assistant's next turn begins."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        eos_id: end of sequence, always present.
        bos_id: begin of sequence, or None.
        pad_id: padding; the end-of-sequence id where the vocabulary has none of its own.
        prompt_prefix: ids that models of this tokenizer expect in front of every text: `[bos_id]`
            or nothing.
        vocab_size: one more than the largest id that text can have.
        ends_sentence: [vocab] bool, tokens whose text ends with . ! ? or a newline, not counting
            quotes, brackets and blanks after it.
    """

    def __init__(self, backend: Backend, *, eos_id: int) -> None:
        self._backend = backend
        self._all_bytes = list(backend.token_bytes)
        self._token_bytes = [
            b"" if index in backend.special_ids else piece
            for index, piece in enumerate(backend.token_bytes)
        ]
        self.eos_id = eos_id
        self.bos_id = backend.bos_id
        self.pad_id = eos_id if backend.pad_id is None else backend.pad_id
        self.prompt_prefix = (
            [backend.bos_id] if backend.adds_bos and backend.bos_id is not None else []
        )
        self.vocab_size = len(backend.pieces)
        self.ends_sentence: Tensor = torch.tensor(
            [_ends_sentence(piece) for piece in self._token_bytes]
        )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a folder with `tokenizer.json` or `tokenizer.model`, or a `.model` file, offline.

        Raises:
            ValueError: `tokenizer.path=...: ...` when it cannot be used.
        """
        try:
            backend = _open_backend(Path(path))
            if backend.eos_id is None:
                raise TokenizerLoadError(
                    "must have an end-of-sequence token; none is declared. "
                    "Set eos_token in tokenizer_config.json."
                )
        except TokenizerLoadError as error:
            raise ValueError(f"tokenizer.path={path}: {error}") from error
        return cls(backend, eos_id=backend.eos_id)

    def extend(self, vocab_size: int) -> None:
        """Let the ids that only a model of a larger vocabulary has, and may sample, be no text."""
        count = vocab_size - len(self._all_bytes)
        self._all_bytes += [b""] * count
        self._token_bytes += [b""] * count
        self.ends_sentence = torch.nn.functional.pad(self.ends_sentence, (0, max(count, 0)))

    def encode(self, text: str, *, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Encode one text; no special token is added unless asked for."""
        return self.encode_batch([text], add_bos=add_bos, add_eos=add_eos)[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_bos: bool = False, add_eos: bool = False
    ) -> list[list[int]]:
        """Encode many texts at once.

        Raises:
            ValueError: when `add_bos` is asked of a vocabulary without such a token.
        """
        if add_bos and self.bos_id is None:
            raise ValueError(
                "tokenizer.add_bos=True: needs a begin-of-sequence token; the vocabulary has none. "
                "Leave it off."
            )
        before = [self.bos_id] if add_bos and self.bos_id is not None else []
        after = [self.eos_id] if add_eos else []
        return [[*before, *ids, *after] for ids in self._backend.encode_batch(texts)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Turn ids into text; bytes that are not valid UTF-8 become U+FFFD."""
        table = self._token_bytes if skip_special else self._all_bytes
        return self._join(table, ids).decode("utf-8", errors="replace")

    def offsets(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Locate every token in `decode(ids)`.

        Returns:
            One (start, end) character span per token. Starts and ends never decrease. Tokens that
            share a character (the bytes of an emoji) all span that character; special tokens are
            empty. Joined in order, the spans cover the whole text.
        """
        data = self._join(self._token_bytes, ids)
        char_of_byte = _char_of_byte(data)
        num_chars = char_of_byte[-1]
        skipped = sum(len(self._token_bytes[index]) for index in ids) - len(data)
        spans, end = [], -skipped
        for index in ids:
            start, end = end, end + len(self._token_bytes[index])
            if end <= max(start, 0):
                position = char_of_byte[max(start, 0)] if start < len(data) else num_chars
                spans.append((position, position))
            else:
                spans.append((char_of_byte[max(start, 0)], char_of_byte[end - 1] + 1))
        return spans

    def apply_chat_template(self, messages: Messages) -> str:
        """Render a chat with the tokenizer's own template, up to the assistant's next turn.

        The text holds its own special tokens: encode it without `add_bos`.

        Raises:
            ValueError: when there is no template, or the template refuses the messages.
        """
        return self._backend.apply_chat_template(messages)

    def fingerprint(self) -> str:
        """Return the sha256 of the vocabulary: where it is equal, equal ids are equal tokens."""
        facts = [self._backend.pieces, self.eos_id, self.bos_id]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _join(self, table: Sequence[bytes], ids: Sequence[int]) -> bytes:
        data = b"".join([table[index] for index in ids])
        return data.removeprefix(b" ") if self._backend.strips_leading_blank else data


def _open_backend(path: Path) -> Backend:
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return HuggingFaceBackend(path)
    if path.is_dir() and (path / "tokenizer.model").is_file():
        return SentencePieceBackend(path / "tokenizer.model")
    if path.is_file() and path.suffix == ".model":
        return SentencePieceBackend(path)
    if not path.exists():
        raise TokenizerLoadError("must exist; not found. Give a tokenizer folder or .model file.")
    raise TokenizerLoadError(
        "must hold tokenizer.json or tokenizer.model; found neither. "
        "Give a tokenizer folder or a SentencePiece .model file."
    )


def _char_of_byte(data: bytes) -> list[int]:
    """Map every byte to the index of its character, with the number of characters at the end."""
    text = data.decode("utf-8", errors="replace")
    if "\ufffd" not in text:
        chars = [index for index, char in enumerate(text) for _ in range(len(char.encode()))]
        return [*chars, len(text)]
    # Invalid bytes: several of them may have become one U+FFFD. Prefixes show which.
    chars, position = [], 0
    for char_index in range(len(text)):
        length = _replaced_length(data, position) if text[char_index] == "\ufffd" else 0
        length = length or len(text[char_index].encode())
        chars.extend([char_index] * length)
        position += length
    return [*chars, len(text)]


def _replaced_length(data: bytes, position: int) -> int:
    """Return how many bytes from `position` on were replaced by one U+FFFD, 0 for a real one."""
    try:
        data[position : position + 4].decode("utf-8")
    except UnicodeDecodeError as error:
        return error.end - error.start if error.start == 0 else 0
    return 0


def _ends_sentence(piece: bytes) -> bool:
    text = piece.decode("utf-8", errors="replace").rstrip(_AFTER_SENTENCE_END)
    return text.endswith((".", "!", "?", "\n"))
