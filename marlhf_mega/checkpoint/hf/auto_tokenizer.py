"""Exported tokenizers: what transformers' AutoTokenizer makes of a folder is what we make of it."""

import json
import logging
from collections.abc import Iterator
from itertools import islice, takewhile
from operator import eq
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.data.tokenizer_backends import json_of
from marlhf_mega.data.train_tokenizer import package_sentencepiece

logger = logging.getLogger(__name__)

TEXTS = (
    "Plain text, with punctuation: isn't it 3.14?",
    "  two blanks before, one after ",
    "Cr\u00e8me br\u00fbl\u00e9e, na\u00efve fa\u00e7ade",
    "\u6f22\u5b57\u3068\u304b\u306a\u4ea4\u3058\u308a\u3002\ud55c\uad6d\uc5b4",
    "smile \U0001f600, family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "one line\nanother\n\n\tindented\n",
)
"""Texts that tokenizers read differently."""

_SETTINGS, _FAST, _SENTENCEPIECE = "tokenizer_config.json", "tokenizer.json", "tokenizer.model"


def fit_auto_tokenizer(folder: Path) -> None:
    """Change the tokenizer files of an export so that AutoTokenizer reads what they hold.

    Folders whose files name another class are left as they are, but for Qwen2: AutoTokenizer takes
    its own byte-level class for every model of that type, whatever class and decoder the files
    declare.
    """
    if (folder / _SENTENCEPIECE).is_file() and not (folder / _FAST).is_file():
        settings = json_of(folder / _SETTINGS)
        if "tokenizer_class" not in settings:
            _package(folder, settings)
    is_qwen2 = json_of(folder / "config.json").get("model_type") == "qwen2"
    if is_qwen2 and (folder / _FAST).is_file() and not _is_byte_level(folder):
        settings = json_of(folder / _SETTINGS) | {"tokenizer_class": "PreTrainedTokenizerFast"}
        # The class is heeded where AutoTokenizer would run code of the folder, of which it has none
        # and nobody is to run any.
        _write(folder / _SETTINGS, settings | {"auto_map": {"AutoTokenizer": [None, None]}})


def text_differences(folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield what AutoTokenizer, in this process, encodes or decodes differently.

    Args:
        folder: a Hugging Face folder.
        tokenizer: ours.
    """
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # noqa: BLE001 classes raise anything for files of others
        yield f"AutoTokenizer does not read it: {' '.join(str(error).split())[:200]}"
        return
    for text in TEXTS:
        ids = tokenizer.encode(text)
        found = theirs.encode(text, add_special_tokens=False)
        if found != ids:
            same = len(list(takewhile(bool, map(eq, found, ids))))
            there, here = (f"{part[same : same + 8]}..." for part in (found, ids))
            yield f"AutoTokenizer encodes {text!r} from token {same} on as {there}, we as {here}"
        written = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if written != tokenizer.decode(ids):
            yield f"AutoTokenizer decodes {text!r} as {written!r}, we as {tokenizer.decode(ids)!r}"
    if (before := theirs.encode("")) != tokenizer.prompt_prefix:
        yield f"AutoTokenizer begins texts with {before}, we with {tokenizer.prompt_prefix}"


def warn_of_other_text(folder: Path, tokenizer: Tokenizer) -> None:
    """Log the first thing that AutoTokenizer encodes or decodes differently, if there is one."""
    for difference in islice(text_differences(folder, tokenizer), 1):
        logger.warning("%s: %s. Use the tokenizer of the run directory.", folder, difference)


def _package(folder: Path, settings: dict[str, Any]) -> None:
    """Write a SentencePiece model for the `tokenizers` library, with its begin token if declared.

    Other kinds than BPE stay as they are: the library would split text in another way.
    """
    begins = bool(Tokenizer.load(folder).prompt_prefix)
    try:
        package_sentencepiece(folder)
    except ValueError:
        return
    packaged = json_of(folder / _SETTINGS)
    if begins:
        fast, bos = FastTokenizer.from_file(str(folder / _FAST)), packaged["bos_token"]
        fast.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, fast.token_to_id(bos))],
        )
        fast.save(str(folder / _FAST))
    _write(folder / _SETTINGS, packaged | settings)


def _is_byte_level(folder: Path) -> bool:
    return '"ByteLevel"' in json.dumps(json_of(folder / _FAST).get("decoder"))


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
