"""Trains a SentencePiece model and packages it so that Hugging Face loaders give the same ids.

The package is a folder with `tokenizer.model` (SentencePiece), `tokenizer.json` (the same model
for the `tokenizers` library) and `tokenizer_config.json` with
`tokenizer_class: PreTrainedTokenizerFast`; with a Llama class name, recent versions of
`transformers` would ignore `tokenizer.json` and treat leading spaces differently.
"""

import io
import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

_BLANK = "\u2581"
_NORMAL, _UNKNOWN, _BYTE = 1, 2, 6
_SMALLEST_VOCAB = 4 + 256

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The chat template of Qwen and others."""
_CONTROL_TOKEN = re.compile(r"<\|[^<>|\s]+\|>")

logger = logging.getLogger(__name__)


def train_tokenizer(
    texts: Iterable[str], folder: Path, *, vocab_size: int, chat_template: str | None = None
) -> None:
    """Train a byte-fallback BPE model on `texts` and write a tokenizer folder.

    Text stays unchanged: no Unicode normalisation, no added leading space, no merging of spaces, so
    that `decode(encode(text)) == text` and the ids of two texts can be concatenated. The
    special tokens are <pad>=0, <s>=1, </s>=2, <unk>=3, and then the control tokens of the chat
    template, `<|name|>`. The same texts give the same files.

    Raises:
        ValueError: `vocab_size` does not suit the amount of text.
    """
    if vocab_size <= _SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size={vocab_size}: must be larger than {_SMALLEST_VOCAB} (4 special tokens and "
            "256 bytes). Use a larger vocabulary."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            num_threads=1,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            control_symbols=_control_tokens(chat_template),
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        # The library's reason follows its source location and the failed condition in brackets.
        reason = str(error).rpartition("] ")[2].strip() or "there is no text."
        raise ValueError(
            f"vocab_size={vocab_size}: must suit the text; {reason} Change the size or the text."
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    package_sentencepiece(folder, chat_template=chat_template)


def _control_tokens(chat_template: str | None) -> list[str]:
    return list(dict.fromkeys(_CONTROL_TOKEN.findall(chat_template or "")))


def package_sentencepiece(folder: Path, *, chat_template: str | None = None) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` beside a BPE `tokenizer.model`.

    Raises:
        ValueError: the model is not BPE with byte fallback and the identity normaliser.
    """
    path = folder / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    _require_supported(proto, path)
    tokenizer = _fast_tokenizer(proto)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_special_names(proto.trainer_spec),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    logger.info("wrote a tokenizer with %d pieces to %s", len(proto.pieces), folder)


def _require_supported(proto: "sentencepiece_model_pb2.ModelProto", path: Path) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    problems = {
        "model type is not BPE": trainer.model_type != trainer.BPE,
        "no byte fallback": not trainer.byte_fallback,
        "a text normaliser": bool(normalizer.precompiled_charsmap),
        "repeated spaces are removed": normalizer.remove_extra_whitespaces,
    }
    found = ", ".join(name for name, is_problem in problems.items() if is_problem)
    if found:
        raise ValueError(
            f"{path}: must be BPE with byte fallback and identity normaliser; found: {found}. "
            "Train it with tools/train_tokenizer.py."
        )


def _special_names(trainer: "sentencepiece_model_pb2.TrainerSpec") -> dict[str, str]:
    """Return the names of the model's special tokens; an id below 0 means that it has none."""
    roles = ("pad", "bos", "eos", "unk")
    return {
        f"{role}_token": getattr(trainer, f"{role}_piece")
        for role in roles
        if getattr(trainer, f"{role}_id") >= 0
    }


def _fast_tokenizer(proto: "sentencepiece_model_pb2.ModelProto") -> Tokenizer:
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    special = [p.piece for p in proto.pieces if p.type not in (_NORMAL, _BYTE)]
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=_merges(proto, vocab),
            unk_token=next(p.piece for p in proto.pieces if p.type == _UNKNOWN),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blank = normalizers.Replace(" ", _BLANK)
    words = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), blank])
        words.append(decoders.Strip(content=" ", left=1))
    else:
        tokenizer.normalizer = blank
    tokenizer.decoder = decoders.Sequence(words)
    tokenizer.add_special_tokens([AddedToken(p, special=True, normalized=False) for p in special])
    return tokenizer


def _merges(
    proto: "sentencepiece_model_pb2.ModelProto", vocab: dict[str, int]
) -> list[tuple[str, str]]:
    """Rebuild the merge list: SentencePiece merges the pair whose result has the best score."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: (-scores[piece], vocab[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
