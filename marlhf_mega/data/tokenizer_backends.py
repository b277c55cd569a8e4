"""The two tokenizer libraries, reduced to ids, bytes per id and special tokens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers.pre_tokenizers import ByteLevel

_BLANK = "\u2581"


class TokenizerLoadError(Exception):
    """What is wrong with a tokenizer, without its path."""


class HuggingFaceBackend:
    """A folder with `tokenizer.json`; nothing is downloaded and no code of the folder is run."""

    def __init__(self, folder: Path) -> None:
        # Imported here: it takes seconds, and SentencePiece runs do not need it.
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
        self.special_ids = frozenset(
            {index for index, token in added.items() if token.special}
            | set(self._tokenizer.all_special_ids)
        )
        self.eos_id = self._tokenizer.eos_token_id
        self.bos_id = self._tokenizer.bos_token_id
        self.pad_id = self._tokenizer.pad_token_id
        self.adds_bos = self.bos_id is not None and self.bos_id in self._fast.encode("").ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode without adding special tokens."""
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Render a chat; see `Tokenizer.apply_chat_template`."""
        from jinja2 import TemplateError

        if self._tokenizer.chat_template is None:
            raise ValueError(_NO_TEMPLATE)
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise ValueError(
                f"prompt: must suit the tokenizer's chat template; it says: {error}. "
                "Change the messages."
            ) from error
        assert isinstance(text, str)
        return text


class SentencePieceBackend:
    """A SentencePiece `.model` file."""

    def __init__(self, path: Path) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(path.read_bytes())
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
        self.adds_bos = self.bos_id is not None and _declares_bos(path.parent)
        self.strips_leading_blank = processor.encode("a", out_type=str)[0].startswith(_BLANK)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode without adding special tokens."""
        ids: list[list[int]] = self._processor.encode(list(texts))
        return ids

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Refuse: a SentencePiece model has no chat template."""
        raise ValueError(_NO_TEMPLATE)


_NO_TEMPLATE = (
    "prompt: must be text for this tokenizer; got chat messages and there is no chat_template. "
    "Use text prompts or a tokenizer folder with a chat_template."
)


def _id_or_none(index: int) -> int | None:
    return index if index >= 0 else None


def _declares_bos(folder: Path) -> bool:
    """Read `add_bos_token`; where nothing is said, models of this kind are trained with it."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return bool(config.get("add_bos_token", True))


def _bytes_of_pieces(
    pieces: list[str], decoder: dict[str, Any] | None, added: dict[int, str]
) -> tuple[list[bytes], bool]:
    """Find the bytes of every piece from the declared decoder; added tokens are plain text.

    Returns:
        The bytes per id, and whether decoding drops one blank at the beginning.
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
    """Invert the byte-level alphabet: printable Latin-1 stays, the rest is moved to U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    table = {chr(byte): byte for byte in kept}
    table |= {chr(0x100 + shift): byte for shift, byte in enumerate(moved)}
    assert set(table) == set(ByteLevel.alphabet())
    return table
