"""The two tokenizer libraries, reduced to encoding, bytes per id and special tokens."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from jinja2 import TemplateError
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel

logger = logging.getLogger(__name__)

_BLANK = "\u2581"


class TokenizerLoadError(Exception):
    """What is wrong with a tokenizer, in a message without its path."""


class HuggingFaceBackend:
    """A folder with `tokenizer.json`; nothing is downloaded and none of its code runs."""

    def __init__(self, folder: Path) -> None:
        # Slow to import, and SentencePiece does not need it.
        from transformers import PreTrainedTokenizerFast

        path = folder / "tokenizer.json"
        try:
            layout = json.loads(path.read_text(encoding="utf-8"))
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # the Rust library raises nothing more specific
            reason = " ".join(str(error).split())[:200]
            raise TokenizerLoadError(
                f"tokenizer.json must be readable; {reason}. Save the tokenizer again."
            ) from error
        self._fast = self._tokenizer.backend_tokenizer
        self._fast.no_truncation()
        self._fast.no_padding()
        added = self._fast.get_added_tokens_decoder()
        size = 1 + max((*self._fast.get_vocab().values(), *added), default=-1)
        self.pieces = [self._fast.id_to_token(index) or "" for index in range(size)]
        self.token_bytes, self.strips_leading_blank = _bytes_of_pieces(
            self.pieces, layout.get("decoder"), {i: token.content for i, token in added.items()}
        )
        self.added_ids = frozenset(added)
        self.special_ids = frozenset(
            {index for index, token in added.items() if token.special}
            | set(self._tokenizer.all_special_ids)
        )
        self.eos_id = self._tokenizer.eos_token_id
        self.bos_id = self._tokenizer.bos_token_id
        self.pad_id = self._tokenizer.pad_token_id
        self.adds_bos = self.bos_id is not None and self.bos_id in self._fast.encode("").ids
        self.template = self._tokenizer.chat_template
        parts = {name: part for name, part in layout.items() if name in _ENCODING}
        self.encoding_hash = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str], *, control_tokens: bool = True) -> list[list[int]]:
        """Encode without adding special tokens; their text is one unless told otherwise."""
        self._fast.encode_special_tokens = not control_tokens
        try:
            encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        finally:
            self._fast.encode_special_tokens = False
        return [encoding.ids for encoding in encodings]

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Encode a text in which special tokens that hold `mark` are ordinary text without it."""
        encoding = self._fast.encode(text, add_special_tokens=False)
        tokens = [*zip(encoding.ids, encoding.offsets, strict=True), (None, (len(text), len(text)))]
        ids: list[int] = []
        ordinary: list[int] = []
        begin = 0
        for index, (start, end) in tokens:
            if index is not None and index not in self.special_ids:
                ordinary.append(index)
                continue
            between = text[begin:start]
            if mark in between:
                plain = between.replace(mark, "")
                (ordinary,) = self.encode_batch([plain], control_tokens=False)
            ids += ordinary if index is None else [*ordinary, index]
            ordinary, begin = [], end
        return ids

    def make_special(self, index: int) -> None:
        """Take an added token for a special one, whatever the files say."""
        content = self.pieces[index]
        self._fast.add_special_tokens([AddedToken(content, special=True, normalized=False)])
        assert self._fast.token_to_id(content) == index
        self.special_ids |= {index}

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Render a chat; see `Tokenizer.apply_chat_template`."""
        if self.template is None:
            raise ValueError(_NO_TEMPLATE)
        last = messages[-1]
        # A message that calls tools is complete; an empty one is a turn that only begins.
        goes_on = last["role"] == "assistant" and not last.get("tool_calls")
        if goes_on and not last["content"].strip() and len(messages) > 1:
            messages, goes_on = messages[:-1], False
        return self._render(
            messages, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )

    def text_after_answer(self) -> str | None:
        """Return what the template writes behind an assistant's last text, None without one."""
        if self.template is None:
            return None
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
        for messages in (chat, [{"role": "system", "content": "a"}, *chat]):
            try:
                text = self._render(messages)
            except ValueError as error:
                logger.debug("a chat that the template does not take: %s", error)
                continue
            if _ANSWER in text:
                return text.rpartition(_ANSWER)[2]
        return None

    def _render(self, messages: Sequence[Mapping[str, Any]], **options: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, **options
            )
        except Exception as error:  # a template raises whatever its expressions do
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split())[:300]
            raise ValueError(
                f"prompt: must suit the tokenizer's chat template, which reports: {reason}. "
                "Change the messages."
            ) from error
        assert isinstance(text, str)
        return text


class SentencePieceBackend:
    """A SentencePiece `.model` file."""

    template: str | dict[str, str] | None = None

    def __init__(self, path: Path) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            proto = path.read_bytes()
            self._processor.LoadFromSerializedProto(proto)
        except (RuntimeError, OSError) as error:
            raise TokenizerLoadError(
                "must be a SentencePiece model; the file cannot be parsed. Give another file."
            ) from error
        processor = self._processor
        ids = range(processor.GetPieceSize())
        self.pieces = [processor.IdToPiece(index) for index in ids]
        self.token_bytes = [_sentencepiece_bytes(piece) for piece in self.pieces]
        self.special_ids = frozenset(
            index for index in ids if processor.IsControl(index) or processor.IsUnknown(index)
        )
        self.eos_id = _id_or_none(processor.eos_id())
        self.bos_id = _id_or_none(processor.bos_id())
        self.pad_id = _id_or_none(processor.pad_id())
        # By default, models with such tokenizers are trained with it.
        declared = json_of(path.parent / "tokenizer_config.json").get("add_bos_token", True)
        self.adds_bos = self.bos_id is not None and bool(declared)
        self.strips_leading_blank = processor.encode("a", out_type=str)[0].startswith(_BLANK)
        self.added_ids: frozenset[int] = frozenset()
        self.encoding_hash = hashlib.sha256(proto).hexdigest()

    def encode_batch(self, texts: Sequence[str], *, control_tokens: bool = True) -> list[list[int]]:
        """Encode without adding special tokens; SentencePiece reads none from text."""
        ids: list[list[int]] = self._processor.encode(list(texts))
        return ids

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Encode without the marks; SentencePiece reads no special token from text."""
        return self.encode_batch([text.replace(mark, "")])[0]

    def make_special(self, index: int) -> None:
        """Do nothing: a SentencePiece model has no added tokens."""

    def text_after_answer(self) -> str | None:
        """Return None: a SentencePiece model has no chat template."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Refuse: a SentencePiece model has no chat template."""
        raise ValueError(_NO_TEMPLATE)


_ANSWER = "marlhfanswer"
_ENCODING = ("normalizer", "pre_tokenizer", "model")
_NO_TEMPLATE = (
    "prompt: must be text, as this tokenizer has no chat_template; got chat messages. "
    "Use text prompts or a tokenizer folder with tokenizer.json and a chat_template."
)


def check_other_files(folder: Path, backend: SentencePieceBackend) -> None:
    """Refuse a folder whose other files say more than its `tokenizer.model`, which alone is read.

    Raises:
        TokenizerLoadError: they add or rename tokens.
    """
    values = [json_of(folder / n) for n in ("special_tokens_map.json", "tokenizer_config.json")]
    settings = values[0] | values[1]
    tokens = dict(enumerate(backend.pieces))
    added: dict[int, str | None]
    added = {index: text for text, index in json_of(folder / "added_tokens.json").items()}
    for index, token in settings.get("added_tokens_decoder", {}).items():
        added[int(index)] = _content(token)
    others = [f"{text!r}, id {i}" for i, text in added.items() if tokens.get(i) != text]
    for name in ("eos", "bos", "pad"):
        named, own = _content(settings.get(f"{name}_token")), getattr(backend, f"{name}_id")
        # A model without a padding token is often given another one to pad with.
        if named is not None and named != tokens.get(own) and (name != "pad" or own is not None):
            others.append(f"{name}_token {named!r}")
    if others:
        raise TokenizerLoadError(
            f"must hold tokenizer.json, as its other files have what tokenizer.model lacks; "
            f"{', '.join(others[:3])}. Save the folder with AutoTokenizer, or give the .model file."
        )


def json_of(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no such file or it holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise TokenizerLoadError(
            f"{path.name} must be JSON; {error}. Save the tokenizer again."
        ) from error
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str | None:
    """Return the text of a token that is written as an object or as text."""
    return token.get("content") if isinstance(token, dict) else token


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None


def _bytes_of_pieces(
    pieces: list[str], decoder: dict[str, Any] | None, added: dict[int, str]
) -> tuple[list[bytes], bool]:
    """Find the bytes of every piece from the declared decoder; added tokens are text.

    Returns:
        Bytes per id, and whether decoding removes a blank at the beginning.
    """
    steps = _decoder_steps(decoder)
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds:
        byte_of_char = _byte_of_char()
        table = [_byte_level_bytes(piece, byte_of_char) for piece in pieces]
        strips = False
    elif kinds & {"Metaspace", "Replace"} and kinds <= _SENTENCEPIECE_STEPS:
        table = [_sentencepiece_bytes(piece) for piece in pieces]
        strips = any(
            step["type"] == "Strip"
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )
    else:
        raise TokenizerLoadError(
            "must decode bytes (ByteLevel) or SentencePiece pieces; tokenizer.json declares the "
            f"decoder {' + '.join(sorted(kinds)) or 'none'}. Use another tokenizer."
        )
    for index, content in added.items():
        table[index] = content.encode()
    return table, strips


_SENTENCEPIECE_STEPS = {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _decoder_steps(inner)]
    return [decoder]


def _sentencepiece_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_BLANK, " ").encode()


def _byte_level_bytes(piece: str, byte_of_char: dict[str, int]) -> bytes:
    if all(char in byte_of_char for char in piece):
        return bytes(byte_of_char[char] for char in piece)
    return piece.encode()


def _byte_of_char() -> dict[str, int]:
    """Invert the byte-level alphabet: printable Latin-1 stays, the rest starts at U+0100."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    table = {chr(byte): byte for byte in kept}
    table |= {chr(0x100 + shift): byte for shift, byte in enumerate(moved)}
    assert set(table) == set(ByteLevel.alphabet())
    return table
