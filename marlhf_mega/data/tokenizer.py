"""One tokenizer for Hugging Face fast tokenizers and SentencePiece models.

Both are reduced to how text becomes ids, and which bytes each id stands for. Decoding, character
offsets and sentence ends follow from the byte table, so they are consistent with each other.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.config.hf import declared_end_ids
from marlhf_mega.data.tokenizer_backends import (
    HuggingFaceBackend,
    SentencePieceBackend,
    TokenizerLoadError,
    check_other_files,
)

Messages = Sequence[Mapping[str, Any]]
"""A chat: `[{"role": "user", "content": "..."}, ...]`."""

_AFTER_SENTENCE_END = "\"'\u201d\u2019\u00bb)]} \t"


Backend = HuggingFaceBackend | SentencePieceBackend


@dataclass(frozen=True)
class TurnEnd:
    """How an answer to chat messages ends."""

    text: str
    """What the chat template writes between the answer and the token that ends the turn."""
    id: int
    """The token that ends the turn."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        eos_id: end of sequence, always present; it ends responses to text prompts.
        turn_end: how the chat template ends an assistant's turn; with `eos_id` if it has no token
            for that.
        end_ids: every token that ends a response, `eos_id` first: that of a turn, and those that
            generation_config.json and `rollout.stop` declare.
        stop_texts: texts of `rollout.stop` that end a response, in UTF-8.
        bos_id: begin of sequence, or None.
        pad_id: padding; the end-of-sequence id if the vocabulary has no padding token.
        prompt_prefix: ids that models of this tokenizer expect before every text: `[bos_id]` or
            nothing.
        vocab_size: one more than the largest id.
        num_known: the model has no row for ids from this on.
        token_bytes: what each id adds to a text; nothing for special tokens.
        ends_sentence: [vocab] bool, tokens whose text ends with . ! ? or a newline, ignoring
            quotes, brackets and blanks after it.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        eos_id: int,
        end_ids: Sequence[int] = (),
        model_end_ids: Sequence[int] = (),
        stop: Sequence[int | str] = (),
        keep_special: bool = False,
    ) -> None:
        """Find what ends a response; see `load`."""
        self._backend = backend
        self._keep_special = keep_special
        self.eos_id = eos_id
        self.turn_end = self._find_turn_end()
        # An id of a model that was made with another vocabulary may be a word of this one.
        own = [index for index in model_end_ids if index in backend.special_ids]
        ids, self.stop_texts = self._find_stops(stop)
        self.end_ids = tuple(dict.fromkeys([eos_id, self.turn_end.id, *end_ids, *own, *ids]))
        for index in backend.added_ids.intersection(self.end_ids) - backend.special_ids:
            backend.make_special(index)
        self.token_bytes = [
            b"" if index in backend.special_ids else piece
            for index, piece in enumerate(backend.token_bytes)
        ]
        self.bos_id = backend.bos_id
        self.pad_id = eos_id if backend.pad_id is None else backend.pad_id
        self.prompt_prefix = (
            [backend.bos_id] if backend.adds_bos and backend.bos_id is not None else []
        )
        self.vocab_size = self.num_known = len(backend.pieces)
        names = [backend.pieces[index] for index in backend.special_ids if backend.pieces[index]]
        names.sort(key=len, reverse=True)
        self._control_token = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self.ends_sentence: Tensor = torch.tensor(
            [_ends_sentence(piece) for piece in self.token_bytes]
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: Path | None = None,
        stop: Sequence[int | str] = (),
        keep_special: bool = False,
        key: str = "tokenizer.path",
    ) -> "Tokenizer":
        """Load a folder with `tokenizer.json` or `tokenizer.model`, or a `.model` file, offline.

        Args:
            path: the folder or file; a folder's generation_config.json declares end tokens.
            model: folder of the model, which may declare more.
            stop: `rollout.stop`.
            keep_special: `rollout.keep_special_tokens`.
            key: the config key that error messages name.

        Raises:
            ValueError: the tokenizer is not usable.
        """
        path = Path(path)
        try:
            backend = _open_backend(path)
            if backend.eos_id is None:
                raise TokenizerLoadError(
                    "must have an end-of-sequence token; none is declared. "
                    "Set eos_token in tokenizer_config.json."
                )
        except TokenizerLoadError as error:
            raise ValueError(f"{key}={path}: {error}") from error
        return cls(
            backend,
            eos_id=backend.eos_id,
            end_ids=declared_end_ids(path, where=f"{key}={path}"),
            model_end_ids=declared_end_ids(model, where=f"model.hf_path={model}") if model else (),
            stop=stop,
            keep_special=keep_special,
        )

    @property
    def special_ids(self) -> frozenset[int]:
        """All special tokens."""
        return self._backend.special_ids

    def ends_clause(self) -> Tensor:
        """Return [vocab] bool: tokens that end a sentence, or with a comma, colon or semicolon."""
        ends = [_ends_with(piece, (",", ":", ";")) for piece in self.token_bytes]
        return self.ends_sentence | torch.tensor(ends)

    def piece(self, index: int) -> str:
        """Return a token as the vocabulary spells it; a control token as texts write it."""
        return self._backend.pieces[index]

    def fit(self, vocab_size: int) -> None:
        """Take the size of the model's vocabulary.

        Ids that only the model has, and may sample, get no text. Of those that only the tokenizer
        has, no text may make use.
        """
        self.num_known = min(vocab_size, self.vocab_size)
        count = vocab_size - len(self.token_bytes)
        self.token_bytes += [b""] * count
        self.ends_sentence = torch.nn.functional.pad(self.ends_sentence, (0, max(count, 0)))

    def encode(self, text: str) -> list[int]:
        """Encode one text; the text of a control token is that token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, control_tokens: bool = True) -> list[list[int]]:
        """Encode many texts at once.

        Args:
            texts: what to encode; nothing is added to them.
            control_tokens: whether the text of a control token is that token, or ordinary text.
        """
        return self._backend.encode_batch(texts, control_tokens=control_tokens)

    def count_control_tokens(self, ids: Collection[int]) -> int:
        """Count the special tokens among ids."""
        return sum(index in self._backend.special_ids for index in ids)

    def split_end(self, text: str) -> tuple[str, int | None]:
        """Take a written-out end token, and blanks behind it, off the end of a text.

        Returns:
            The text before it, and its id, None where there is none.
        """
        stripped = text.rstrip()
        for index in self._backend.special_ids.intersection(self.end_ids):
            piece = self._backend.pieces[index]
            if piece and stripped.endswith(piece):
                return stripped.removesuffix(piece), index
        return text, None

    def end_text(self, ids: Sequence[int]) -> str | None:
        """Return how the end token that a response ends with is written, None without one."""
        is_ended = bool(ids) and ids[-1] in self.end_ids and not self.token_bytes[ids[-1]]
        return self._backend.pieces[ids[-1]] if is_ended else None

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, without special tokens; invalid UTF-8 becomes U+FFFD."""
        return self._join(ids).decode("utf-8", errors="replace")

    def response_text(self, ids: Sequence[int]) -> str:
        """Turn a response into the text that rules and files get.

        It has no special tokens, or all but the end token with `rollout.keep_special_tokens`.
        """
        if not self._keep_special:
            return self.decode(ids)
        special = self._backend.special_ids
        if ids and ids[-1] in special.intersection(self.end_ids):
            ids = ids[:-1]
        data = b"".join(
            self._backend.pieces[index].encode() if index in special else self.token_bytes[index]
            for index in ids
        )
        strips = self._backend.strips_leading_blank
        return (data.removeprefix(b" ") if strips else data).decode("utf-8", errors="replace")

    def offsets(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Locate every token in `decode(ids)`.

        Returns:
            One (start, end) character span per token. Starts and ends never decrease. Tokens that
            share a character (the bytes of an emoji) all span that character; special tokens are
            empty. Joined in order, the spans cover the whole text.
        """
        data = self._join(ids)
        char_of_byte = _char_of_byte(data)
        num_chars = char_of_byte[-1]
        skipped = sum(len(self.token_bytes[index]) for index in ids) - len(data)
        spans, end = [], -skipped
        for index in ids:
            start, end = end, end + len(self.token_bytes[index])
            if end <= max(start, 0):
                position = char_of_byte[max(start, 0)] if start < len(data) else num_chars
                spans.append((position, position))
            else:
                spans.append((char_of_byte[max(start, 0)], char_of_byte[end - 1] + 1))
        return spans

    def apply_chat_template(self, messages: Messages) -> str:
        """Render a chat with the tokenizer's own template, up to the assistant's next turn.

        If the last message is the assistant's, the text ends with it, to be continued. It contains
        its special tokens: do not add `prompt_prefix`.

        Raises:
            ValueError: there is no template, or it refuses the messages.
        """
        return self._backend.apply_chat_template(messages)

    def mark_control_tokens(self, messages: Messages) -> tuple[Messages, str]:
        """Tell the control tokens that messages spell out from those of a template.

        Returns:
            The messages, with a mark behind the first character of every such token; the mark, a
            character that they do not have, or nothing where they spell out no control token.
        """
        texts = list(_texts(messages))
        if not any(map(self._control_token.search, texts)):
            return messages, ""
        private_use = map(chr, range(0xE000, 0xF900))
        mark = next(char for char in private_use if not any(char in text for text in texts))

        def marked(text: str) -> str:
            return self._control_token.sub(lambda found: found[0][:1] + mark + found[0][1:], text)

        return [_map_texts(message, marked) for message in messages], mark

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Encode a rendered chat; control tokens with a mark are ordinary text without it."""
        return self._backend.encode_marked(text, mark)

    def prompt_fingerprint(self) -> str:
        """Return the sha256 of all that decides which ids a row becomes and where responses end."""
        backend = self._backend
        facts = [self.fingerprint(), backend.encoding_hash, backend.template, self.prompt_prefix]
        return hashlib.sha256(json.dumps([*facts, sorted(self.end_ids)]).encode()).hexdigest()

    def difference(self, other: "Tokenizer") -> str | None:
        """Name the first id that stands for another token in both vocabularies, None if none is."""
        pairs = zip(self._backend.pieces, other._backend.pieces, strict=False)
        for index, (ours, theirs) in enumerate(pairs):
            if ours != theirs and ours and theirs:
                return f"id {index} is {theirs!r} there and {ours!r} here"
        return None

    def fingerprint(self) -> str:
        """Return the sha256 of the vocabulary; if it is equal, equal ids are equal tokens."""
        facts = [self._backend.pieces, self.eos_id, self.bos_id]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _find_turn_end(self) -> TurnEnd:
        after = self._backend.text_after_answer() or ""
        for index in self._backend.encode_batch([after])[0]:
            piece = self._backend.pieces[index]
            if index in self._backend.special_ids or (
                index in self._backend.added_ids and piece.strip()
            ):
                return TurnEnd(after.partition(piece)[0], index)
        return TurnEnd(after.rstrip(), self.eos_id)

    def _find_stops(self, stop: Sequence[int | str]) -> tuple[list[int], tuple[bytes, ...]]:
        ids, texts = [], []
        for value in stop:
            if isinstance(value, int):
                if not 0 <= value < len(self._backend.pieces):
                    raise ValueError(
                        f"rollout.stop={value}: must be an id of the tokenizer, below "
                        f"{len(self._backend.pieces)}. Change it."
                    )
                ids.append(value)
                continue
            index = next(
                (i for i in self._backend.special_ids if self._backend.pieces[i] == value), None
            )
            if index is None:
                texts.append(value.encode())
            else:
                ids.append(index)
        return ids, tuple(texts)

    def _join(self, ids: Sequence[int]) -> bytes:
        data = b"".join([self.token_bytes[index] for index in ids])
        return data.removeprefix(b" ") if self._backend.strips_leading_blank else data


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a folder holds a tokenizer that can be read."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _open_backend(path: Path) -> Backend:
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return HuggingFaceBackend(path)
    if path.is_dir() and (path / "tokenizer.model").is_file():
        backend = SentencePieceBackend(path / "tokenizer.model")
        check_other_files(path, backend)
        return backend
    if path.is_file() and path.suffix == ".model":
        return SentencePieceBackend(path)
    if not path.exists():
        raise TokenizerLoadError("must exist; not found. Give a tokenizer folder or .model file.")
    raise TokenizerLoadError(
        "must hold tokenizer.json or tokenizer.model; found neither. "
        "Give a tokenizer folder or a SentencePiece .model file."
    )


def _texts(value: Any) -> Iterator[str]:
    """Yield every text within a JSON value but the names of fields."""
    match value:
        case str():
            yield value
        case Mapping():
            for item in value.values():
                yield from _texts(item)
        case list() | tuple():
            for item in value:
                yield from _texts(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Change every text that `_texts` yields."""
    match value:
        case str():
            return change(value)
        case Mapping():
            return {name: _map_texts(item, change) for name, item in value.items()}
        case list() | tuple():
            return [_map_texts(item, change) for item in value]
    return value


def _char_of_byte(data: bytes) -> list[int]:
    """Map every byte to the index of its character, followed by the number of characters."""
    text = data.decode("utf-8", errors="replace")
    if "\ufffd" not in text:
        chars = [index for index, char in enumerate(text) for _ in range(len(char.encode()))]
        return [*chars, len(text)]
    # Several invalid bytes may have become one U+FFFD.
    chars, position = [], 0
    for char_index in range(len(text)):
        length = _replaced_length(data, position) if text[char_index] == "\ufffd" else 0
        length = length or len(text[char_index].encode())
        chars.extend([char_index] * length)
        position += length
    return [*chars, len(text)]


def _replaced_length(data: bytes, position: int) -> int:
    """Return how many bytes at `position` became one U+FFFD; 0 if the text really has one."""
    try:
        data[position : position + 4].decode("utf-8")
    except UnicodeDecodeError as error:
        return error.end - error.start if error.start == 0 else 0
    return 0


def _ends_sentence(piece: bytes) -> bool:
    return _ends_with(piece, (".", "!", "?", "\n"))


def _ends_with(piece: bytes, signs: tuple[str, ...]) -> bool:
    text = piece.decode("utf-8", errors="replace").rstrip(_AFTER_SENTENCE_END)
    return text.endswith(signs)
