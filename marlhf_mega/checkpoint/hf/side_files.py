"""The files beside the weights: config.json, generation settings, tokenizer."""

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from marlhf_mega.config.hf import read_hf_config
from marlhf_mega.config.hf_families import HfHead, class_name
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
_WEIGHTS = (
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
    *("*.gguf", "*.h5", "*.msgpack", "*.npz", "*.onnx*", "*.ot"),
)
"""Weights of any library, and pickles."""
_CONFIG, _GENERATION = "config.json", "generation_config.json"


def copy_side_files(source: Path, target: Path, *, skip: Collection[str] = ()) -> None:
    """Copy all of a model's folder but weights, code and hidden files; else a tokenizer's files.

    Args:
        source: a Hugging Face folder, or any folder that has a tokenizer.
        target: an existing folder.
        skip: patterns of relative paths that are not copied.
    """
    is_model = (source / _CONFIG).is_file()
    for pattern in ("**/*",) if is_model else _TOKENIZER:
        for path in sorted(source.glob(pattern)):
            name = path.relative_to(source)
            if path.is_file() and not _is_left(name) and not _matches(str(name), skip):
                copy = target / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def _is_left(name: Path) -> bool:
    # The code of a folder is not run here, and has no part in the model that is exported.
    hidden = any(part.startswith(".") for part in name.parts)
    return hidden or name.suffix == ".py" or _matches(name.name, _WEIGHTS)


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


@dataclass(frozen=True, kw_only=True)
class SideFiles:
    """Where an export's small files come from."""

    source: Path | None = None
    """The Hugging Face folder that the model was imported from; its files are copied unchanged."""
    tokenizer: Path | None = None
    """A tokenizer folder, instead of the tokenizer in `source`."""
    bos_token_id: int | None = None
    end_ids: tuple[int, ...] = ()
    """All tokens that end a response; the files of `source` keep theirs if these are the same, or
    if none are given."""
    pad_token_id: int | None = None
    """A scalar head that scores batches needs it in config.json; one in `source` is kept."""


def write_side_files(
    folder: Path, files: SideFiles, *, config: ModelConfig, head: HfHead, dtype: str
) -> None:
    """Write config.json and copy the other files.

    In the source's config.json only the class, the number format and the label of a scalar head are
    changed; it is copied unchanged if these are right already.

    Args:
        folder: the folder of the export.
        files: where they come from.
        config: the model.
        head: the model's head.
        dtype: of the weights, such as `bfloat16`.

    Raises:
        ValueError: the model cannot be written as its architecture.
    """
    if files.source is not None:
        # Two tokenizers must not mix.
        skip = (_CONFIG, *(_TOKENIZER if files.tokenizer is not None else ()))
        copy_side_files(files.source, folder, skip=skip)
    if files.tokenizer is not None:
        copy_side_files(files.tokenizer, folder, skip=(_CONFIG, _GENERATION))
    target = folder / _CONFIG
    if files.source is None:
        hf = hf_config_from_model(
            config,
            head=head,
            dtype=dtype,
            bos_token_id=files.bos_token_id,
            eos_token_id=_eos_token_id(files.end_ids),
            pad_token_id=files.pad_token_id,
        )
        _write(target, hf)
        if head == "causal_lm" and files.end_ids:
            # A run keeps those of the folder that it, or the run before it, began from.
            kept = None if files.tokenizer is None else files.tokenizer / _GENERATION
            original = json.loads(kept.read_text()) if kept is not None and kept.is_file() else {}
            _write(folder / _GENERATION, _generation(files, original))
        return
    _correct_generation(folder / _GENERATION, files)
    original = read_hf_config(files.source, where=f"model.hf_path={files.source}")
    edited = original | _edits(original, files, config=config, head=head, dtype=dtype)
    if edited == original:
        shutil.copyfile(files.source / _CONFIG, target)
    else:
        _write(target, edited)


def _correct_generation(path: Path, files: SideFiles) -> None:
    """Let an export's generation settings stop where training did."""
    if not path.is_file():
        return
    original = json.loads(path.read_text(encoding="utf-8"))
    if _stops_elsewhere(original, files):
        _write(path, _generation(files, original))


def _generation(files: SideFiles, original: dict[str, Any]) -> dict[str, Any]:
    own = {"bos_token_id": files.bos_token_id, "pad_token_id": files.pad_token_id}
    found = {name: value for name, value in own.items() if value is not None}
    return found | original | {"eos_token_id": _eos_token_id(files.end_ids)}


def _stops_elsewhere(original: dict[str, Any], files: SideFiles) -> bool:
    named = original.get("eos_token_id")
    ids = named if isinstance(named, list) else [named]
    return bool(files.end_ids) and set(ids) != set(files.end_ids)


def _eos_token_id(end_ids: tuple[int, ...]) -> int | list[int] | None:
    """Write one id as transformers did before it knew several."""
    return list(end_ids) if len(end_ids) > 1 else next(iter(end_ids), None)


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _edits(
    original: dict[str, Any], files: SideFiles, *, config: ModelConfig, head: HfHead, dtype: str
) -> dict[str, Any]:
    edits: dict[str, Any] = {"architectures": [class_name(config.architecture, head)]}
    if _stops_elsewhere(original, files):
        edits["eos_token_id"] = _eos_token_id(files.end_ids)
    edits["dtype" if "dtype" in original else "torch_dtype"] = dtype
    if head == "sequence_classification":
        if len(original.get("id2label") or ()) != 1:
            edits |= scalar_head_fields()
        if original.get("pad_token_id") is None and files.pad_token_id is not None:
            edits["pad_token_id"] = files.pad_token_id
    return edits
