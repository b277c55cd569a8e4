"""What stands beside the weights: config.json, generation settings, tokenizer."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlhf_mega.config.hf import read_hf_config
from marlhf_mega.config.hf_families import Head, class_name
from marlhf_mega.config.hf_write import hf_config_from_model, scalar_head_fields
from marlhf_mega.config.model import ModelConfig

_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
_KEPT = ("generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True, kw_only=True)
class SideFiles:
    """Where an export's small files come from."""

    source: Path | None = None
    """The Hugging Face folder the model began as; its files are kept byte for byte."""
    tokenizer: Path | None = None
    """A tokenizer folder, in place of the tokenizer in `source`."""
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    """Needed in config.json by a scalar head that scores batches; `source` keeps its own."""


def write_side_files(
    folder: Path, files: SideFiles, *, config: ModelConfig, head: Head, dtype: str
) -> None:
    """Write config.json and copy the rest.

    config.json of the source stays as it is but for the class, the number format and the label of a
    scalar head, and byte for byte where these are right already.

    Args:
        folder: the export.
        files: where they come from.
        config: the model.
        head: what the model ends in.
        dtype: of the weights, such as `bfloat16`.

    Raises:
        ValueError: the model cannot be written as its architecture.
    """
    tokenizer = files.tokenizer or files.source
    if tokenizer is not None:
        _copy(tokenizer, folder, _TOKENIZER)
    target = folder / "config.json"
    if files.source is None:
        hf = hf_config_from_model(
            config,
            head=head,
            dtype=dtype,
            bos_token_id=files.bos_token_id,
            eos_token_id=files.eos_token_id,
            pad_token_id=files.pad_token_id,
        )
        target.write_text(json.dumps(hf, indent=2) + "\n", encoding="utf-8")
        return
    _copy(files.source, folder, _KEPT)
    original = read_hf_config(files.source, where=f"model.hf_path={files.source}")
    edited = original | _edits(original, files, config=config, head=head, dtype=dtype)
    if edited == original:
        shutil.copyfile(files.source / "config.json", target)
    else:
        target.write_text(json.dumps(edited, indent=2) + "\n", encoding="utf-8")


def _edits(
    original: dict[str, Any], files: SideFiles, *, config: ModelConfig, head: Head, dtype: str
) -> dict[str, Any]:
    edits: dict[str, Any] = {"architectures": [class_name(config.architecture, head)]}
    edits["dtype" if "dtype" in original else "torch_dtype"] = dtype
    if head == "sequence_classification":
        if len(original.get("id2label") or ()) != 1:
            edits |= scalar_head_fields()
        if original.get("pad_token_id") is None and files.pad_token_id is not None:
            edits["pad_token_id"] = files.pad_token_id
    return edits


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
