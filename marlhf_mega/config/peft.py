"""`adapter_config.json` of peft's folders: read and written."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from marlhf_mega.config.lora import MODULES, LoraConfig
from marlhf_mega.config.model import Head

CONFIG_FILE = "adapter_config.json"
_MUST_BE_OFF = (
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
"""Settings that make an adapter more than a product of two matrices on some projections."""
_TASKS: dict[Head, str] = {"language": "CAUSAL_LM", "scalar": "SEQ_CLS"}


def lora_from_peft(folder: Path, base: LoraConfig, *, key: str = "model.lora.path") -> LoraConfig:
    """Read rank, alpha, dropout and targets of a folder.

    Args:
        folder: written by peft or an export of ours.
        base: the user's section; what it sets must be that of the folder, except dropout.
        key: configuration key that names the folder.

    Raises:
        ValueError: there is no such folder, it holds what is not supported, or another value.
    """
    values = _read(folder, key=key)
    targets = values.get("target_modules")
    names = [targets] if targets == "all-linear" else targets
    if not isinstance(names, list):
        raise ValueError(
            f"{key}={folder}: target_modules must be a list in {CONFIG_FILE}; it is {targets}. "
            "Save the adapter with a present version of peft."
        )
    try:
        found = LoraConfig(
            rank=values.get("r"),
            alpha=values.get("lora_alpha"),
            rank_stabilized=bool(values.get("use_rslora")),
            dropout=base.dropout
            if "dropout" in base.model_fields_set
            else values.get("lora_dropout") or 0.0,
            targets=tuple(sorted({str(name).split(".")[-1] for name in names})),
            path=folder,
        )
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ValueError(f"{key}={folder}: {reason}") from None
    if found.rank is None:
        raise ValueError(f"{key}={folder}: {CONFIG_FILE} must give the rank r; it does not.")
    for name in base.model_fields_set - {"path", "dropout"}:
        ours, theirs = getattr(base, name), getattr(found, name)
        if name == "targets":
            ours, theirs = base.named, found.modules
        if ours is not None and ours != theirs:
            raise ValueError(
                f"model.lora.{name}={ours}: must be that of {CONFIG_FILE} in {key}; it is "
                f"{theirs} there. Remove the key."
            )
    return found


def head_of_peft(folder: Path, *, key: str) -> Head:
    """Return the head of the model that a folder's adapters belong to."""
    return "scalar" if _read(folder, key=key).get("task_type") == "SEQ_CLS" else "language"


def peft_from_lora(lora: LoraConfig, head: Head, base: Path | None) -> dict[str, Any]:
    """Return the content of the file.

    Args:
        lora: with a rank.
        head: of the model; a scalar one is saved with the adapters.
        base: Hugging Face folder of the frozen weights, if there is one.
    """
    alpha = lora.alpha or 2.0 * lora.size
    return {
        "peft_type": "LORA",
        "task_type": _TASKS[head],
        "base_model_name_or_path": None if base is None else str(base),
        "r": lora.size,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": lora.rank_stabilized,
        "lora_dropout": lora.dropout,
        "target_modules": [name for name in MODULES if name in lora.modules],
        "modules_to_save": ["score"] if head == "scalar" else None,
        "bias": "none",
        "inference_mode": True,
    }


def _read(folder: Path, *, key: str) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(
            f"{key}={folder}: must be a folder of peft; it has no {CONFIG_FILE}. Check the path."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{key}={folder}: {CONFIG_FILE} must be peft's; {type(error).__name__}: {error}. Save "
            "the adapter again."
        ) from None
    wrong = [name for name in _MUST_BE_OFF if values.get(name)]
    if values.get("bias", "none") != "none":
        wrong.append("bias")
    if set(values.get("modules_to_save") or ()) - {"score", "classifier"}:
        wrong.append("modules_to_save")
    if kind != "LORA" or wrong:
        what = f"peft_type={kind}" if kind != "LORA" else f"{wrong[0]}={values[wrong[0]]}"
        raise ValueError(
            f"{key}={folder}: must hold plain LoRA adapters; it has {what}. Merge it into its base "
            "with peft, and use the result as model.hf_path."
        )
    return values
