"""Converts a Hugging Face config.json to `ModelConfig`.

A field that affects the forward pass and that `ModelConfig` lacks is refused, never ignored.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args

from pydantic import ValidationError

from marlhf_mega.config.hf_families import COMMON_DEFAULTS, FAMILIES, Family, HfHead, class_name
from marlhf_mega.config.model import Architecture, ModelConfig

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_EXPERT_COUNTS = ("num_experts", "num_experts_per_tok")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Gemma's first release has "gelu" and means the tanh approximation.
_GEMMA_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh")
_USER_MAY_SET = {"hf_path", "init", "max_positions", "router_aux_loss_coef", "init_std", "lora"}
_DERIVED_WHEN_NONE = {
    "vocab_size",
    "num_query_groups",
    "head_dim",
    "expert_ffn_hidden_size",
    "query_scale",
}


def model_config_from_hf(
    folder: Path, base: ModelConfig, *, key: str = "model.hf_path"
) -> ModelConfig:
    """Read a model's architecture from a folder's config.json.

    Args:
        folder: a Hugging Face model folder, `*ForCausalLM` or `*ForSequenceClassification`.
        base: the user's section, which supplies `hf_path`, `init`, and, where set, `lora`,
            `max_positions`, `router_aux_loss_coef` and `init_std`.
        key: configuration key that names the folder.

    Returns:
        The complete section.

    Raises:
        ValueError: config.json is not readable; an architecture, rope type or field is not
            supported; the user set a key to another value. One line per problem.
    """
    where = f"{key}={folder}"
    hf = read_hf_config(folder, where=where)
    head_of_hf_config(hf, where=where)
    problems: list[str] = []
    fields = fields_from_hf(hf, where=where)
    for name in sorted(base.model_fields_set):
        theirs, ours = fields.get(name), getattr(base, name)
        if name in _USER_MAY_SET or (ours is None and name in _DERIVED_WHEN_NONE):
            continue
        if ours != theirs:
            problems.append(
                f"model.{name}={ours}: must be that of config.json in {key}; it is "
                f"{theirs} there. Remove the key."
            )
    if problems:
        raise ValueError("\n".join(problems))
    kept = {name: getattr(base, name) for name in _USER_MAY_SET & base.model_fields_set}
    return ModelConfig.model_validate(fields | {"hf_path": folder} | kept)


def read_hf_config(folder: Path, *, where: str) -> dict[str, Any]:
    """Read config.json.

    Args:
        folder: a Hugging Face folder.
        where: prefix of error messages.

    Raises:
        ValueError: the file is missing or is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{where}: must be a Hugging Face folder; it has no config.json. Give the folder of a "
            "downloaded model."
        )
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{where}: config.json must be JSON; {error}. Download the file again."
        ) from None
    if not isinstance(hf, dict):
        raise ValueError(
            f"{where}: config.json must be a JSON object; it is a {type(hf).__name__}. Download "
            "the file again."
        )
    return hf


def declared_end_ids(folder: Path, *, where: str) -> list[int]:
    """Read the ids at which a folder's model stops, as transformers does.

    `generation_config.json` names one or several; without that file `config.json` does.

    Args:
        folder: a model or tokenizer folder.
        where: prefix of error messages.

    Raises:
        ValueError: the file is not JSON, or its `eos_token_id` is no id.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{where}: {name} must be a JSON object; {error}. Download the file again."
            ) from None
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(index) is int and index >= 0 for index in ids):
            raise ValueError(
                f"{where}: {name}: eos_token_id must be an id or a list of ids; it is "
                f"{json.dumps(found)}. Fix the file."
            )
        return ids
    return []


def head_of_hf_config(hf: Mapping[str, Any], *, where: str) -> HfHead:
    """Tell which head the weights of a config.json have.

    Args:
        hf: the content of config.json.
        where: prefix of error messages.

    Raises:
        ValueError: the architecture or its class is unknown, or the number of labels is not 1.
    """
    architecture = _architecture(hf, where)
    classes = {class_name(architecture, head): head for head in get_args(HfHead)}
    named = hf.get("architectures") or [class_name(architecture, "causal_lm")]
    if len(named) != 1 or named[0] not in classes:
        raise ValueError(
            f"{where}: config.json must name one class of {', '.join(classes)}; it has "
            f"architectures={named}. Use a checkpoint with one of these heads."
        )
    head: HfHead = classes[named[0]]
    labels = len(hf["id2label"]) if hf.get("id2label") else hf.get("num_labels", 2)
    if head == "sequence_classification" and labels != 1:
        raise ValueError(
            f"{where}: a classification head must have one label; config.json has "
            f"num_labels={labels}. Use a reward model with one output."
        )
    return head


def _architecture(hf: Mapping[str, Any], where: str) -> Architecture:
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"{where}: config.json must name a known architecture ({', '.join(FAMILIES)}); it "
            f"has model_type={kind}. Use a model of one of these families."
        )
    return cast(Architecture, kind)


def fields_from_hf(hf: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Convert the content of config.json to the fields of `ModelConfig`.

    Args:
        hf: the content of config.json.
        where: prefix of error messages.

    Raises:
        ValueError: a field is not supported.
    """
    architecture = _architecture(hf, where)
    family = FAMILIES[architecture]
    values = {**COMMON_DEFAULTS, **family.defaults, **hf}
    if "num_local_experts" in hf:  # Mixtral's name, and that of all architectures in transformers 5
        values["num_experts"] = hf["num_local_experts"]
    problems = [*_unsupported(values, family)]
    gemma = architecture.startswith("gemma")
    activation = _activation(hf, gemma=gemma)
    if activation is None:
        names = {name: hf[name] for name in ("hidden_act", "hidden_activation") if name in hf}
        known = _GEMMA_ACTIVATIONS if gemma else _ACTIVATIONS
        problems.append(f"hidden_act must be one of {', '.join(known)}; it is {names}")
    if problems:
        raise ValueError(
            "\n".join(f"{where}: config.json: {p}. Use another model." for p in problems)
        )
    heads = values["num_attention_heads"]
    fields: dict[str, Any] = {
        "architecture": architecture,
        "num_layers": values["num_hidden_layers"],
        "hidden_size": values["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": values["num_key_value_heads"] or heads,
        "head_dim": values["head_dim"] or values["hidden_size"] // heads,
        "ffn_hidden_size": values["intermediate_size"],
        "vocab_size": values["vocab_size"],
        "max_positions": values["max_position_embeddings"],
        "norm_eps": values["rms_norm_eps"],
        "activation": activation,
        "tied_embeddings": values["tie_word_embeddings"],
        "init_std": values["initializer_range"],
        **family.constants,
        **_rope(hf, values, where),
        **_window(values, family, where),
        **_experts(values, architecture),
    }
    if architecture == "gemma2":
        fields |= {
            "query_scale": values["query_pre_attn_scalar"],
            "attention_softcap": values["attn_logit_softcapping"],
            "logits_softcap": values["final_logit_softcapping"],
        }
    return _validated(fields, where)


def _validated(fields: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        config = ModelConfig.model_validate(fields)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"])
            said = problem["msg"].removeprefix("Value error, ")
            text = f"{name}={problem['input']}: {said}" if name else said
            lines.append(f"{where}: config.json gives {text} Fix config.json.")
        raise ValueError("\n".join(lines)) from None
    return {name: getattr(config, name) for name in ModelConfig.model_fields}


def _unsupported(values: Mapping[str, Any], family: Family) -> Iterator[str]:
    experts = [name for name in _EXPERT_COUNTS if name in family.defaults]
    for name in [*_REQUIRED, *experts]:
        if not isinstance(values.get(name), int) or values[name] <= 0:
            yield f"{name} must be a positive integer; it is {json.dumps(values.get(name))}"
    neutral = {"quantization_config": None, "partial_rotary_factor": 1.0, **family.neutral}
    for name, value in neutral.items():
        if values.get(name) not in (None, value):
            shown = "absent" if value is None else json.dumps(value)
            yield f"{name} must be {shown}; it is {json.dumps(values[name])}"


def _activation(hf: Mapping[str, Any], *, gemma: bool) -> str | None:
    if not gemma:
        return _ACTIVATIONS.get(hf.get("hidden_act") or "silu")
    named = {hf.get("hidden_act"), hf.get("hidden_activation")} - {None}
    return "gelu_tanh" if named <= set(_GEMMA_ACTIVATIONS) else None


def _rope(hf: Mapping[str, Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Read `rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5)."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }
    if kind not in needed:
        raise ValueError(
            f"{where}: config.json: rope type must be one of {', '.join(needed)}; it is {kind}. "
            "Use a model without it, or remove the scaling if short contexts are enough."
        )
    odd = [key for key in rope if isinstance(rope[key], dict)]
    if odd or rope.get("partial_rotary_factor") not in (None, 1.0):
        problem = (
            f"rope_parameters must not differ by layer type; it has {', '.join(odd)}"
            if odd
            else f"partial_rotary_factor must be 1.0; it is {rope['partial_rotary_factor']}"
        )
        raise ValueError(f"{where}: config.json: {problem}. Use another model.")
    absent = [key for key in needed[kind] if rope.get(key) is None]
    if absent:
        raise ValueError(
            f"{where}: config.json: rope type {kind} needs {', '.join(absent)}; config.json lacks "
            "it. Fix config.json."
        )
    scaling = {"kind": "none" if kind == "default" else kind}
    scaling |= {key: rope[key] for key in needed[kind]}
    if kind == "llama3":
        scaling["original_max_positions"] = (
            hf.get("original_max_position_embeddings")
            or rope.get("original_max_position_embeddings")
            or values["max_position_embeddings"]
        )
    return {"rope_theta": rope.get("rope_theta") or values["rope_theta"], "rope_scaling": scaling}


def _window(values: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Find the layers with a sliding window; transformers 5 lists them in `layer_types`."""
    width, layers = values["sliding_window"], values["num_hidden_layers"]
    off = family.window == "switched" and not values.get("use_sliding_window")
    if family.window == "never" or off or not width:
        return {"sliding_window": None, "sliding_window_every": 1}
    default = {
        "always": [True] * layers,
        "switched": [i >= values.get("max_window_layers", 0) for i in range(layers)],
        "alternating": [i % 2 == 0 for i in range(layers)],
    }[family.window]
    types = values.get("layer_types")
    slides = default if types is None else [kind == "sliding_attention" for kind in types]
    known = {"sliding_attention", "full_attention"}
    # A single layer fits both patterns; take the one of the architecture.
    patterns = (2, 1) if family.window == "alternating" else (1, 2)
    for every in patterns:
        if slides == [i % every == 0 for i in range(layers)] and known.issuperset(types or ()):
            return {"sliding_window": width, "sliding_window_every": every}
    if slides == [False] * layers and known.issuperset(types or ()):
        return {"sliding_window": None, "sliding_window_every": 1}
    name = "max_window_layers" if types is None else "layer_types"
    raise ValueError(
        f"{where}: config.json: {name} must give a sliding window to all {layers} layers, to every "
        f"other one from the first on, or to none; it is {json.dumps(values[name])}. Use another "
        "model."
    )


def _experts(values: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    if architecture not in ("mixtral", "qwen2_moe", "qwen3_moe"):
        return {}
    inner = "intermediate_size" if architecture == "mixtral" else "moe_intermediate_size"
    own = {
        "num_experts": values["num_experts"],
        "experts_per_token": values["num_experts_per_tok"],
        "expert_ffn_hidden_size": values[inner],
    }
    if architecture != "mixtral":
        own["router_softmax_first"] = not values["norm_topk_prob"]
    if architecture == "qwen2_moe":
        own["shared_expert_ffn_hidden_size"] = values["shared_expert_intermediate_size"]
        own["qkv_bias"] = values["qkv_bias"]
    return own
