"""Turns YAML files and dotted overrides into one frozen `Config`; reports one line per problem."""

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from yaml import MarkedYAMLError, YAMLError

from marlhf_mega.config.origin import find_origin
from marlhf_mega.config.peft import lora_from_peft
from marlhf_mega.config.schema import Config
from marlhf_mega.config.secrets import redact

_RUN_FACTS = {
    *("tokenizer_fingerprint", "prompt_fingerprint", "layout", "dtype", "versions"),
    "git_revision",
}
"""What a run adds to its config.yaml; ignored when that file is given as --config."""
_RENAMED = {
    "critic.warmup_ppo_steps": "ppo.critic_only_steps",
    "ppo.sampler_cap": "ppo.tis_cap",
}
"""Former names of keys and their present ones."""
_YAML_WORDS = {"None": "null", "True": "true", "False": "false"}
_RULES = {
    "tuple_type": "input should be a list, such as [a,b]",
    "dict_type": "input should be a mapping, such as {a: b}",
    "model_type": "input should be a mapping of keys",
    "path_type": "input should be a path",
}
"""Replacements for messages of pydantic that speak of Python types."""


class ConfigError(ValueError):
    """The user's configuration is not usable; the message has one line per problem."""


def load_config(
    path: Path | None, overrides: Sequence[str] = (), *, need_weights: bool = True
) -> Config:
    """Read a YAML file, apply `key=value` overrides and validate the result.

    Args:
        path: a YAML file with what differs from the defaults. None means defaults only.
        overrides: dotted assignments such as `rollout.top_k=50`; values are YAML, but texts and
            paths stand as they are. `none` means null where a key may be null.
        need_weights: whether the model's folder must exist; a plan needs only the shape, which
            the file may give.

    Returns:
        The resolved configuration; the model section is that of the folder in `model.hf_path`.

    Raises:
        ConfigError: one line for every unknown key, invalid value and broken rule.
    """
    values = _merge(_read(path), _parse_overrides(overrides))
    if problems := list(_secrets_in(values)):
        raise ConfigError("\n".join(problems))
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error))) from None
    try:
        return _with_adapters(_with_origin(config, need_weights=need_weights))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _with_origin(config: Config, *, need_weights: bool) -> Config:
    """Take the architecture from the folder of the weights."""
    model = config.model
    folder = model.hf_path or Path(model.init)
    if not need_weights and not folder.exists() and "num_layers" in model.model_fields_set:
        return config
    if model.hf_path is not None:
        if model.init not in ("auto", "random"):
            raise ValueError(
                f"model.init={model.init}: cannot be combined with model.hf_path, which gives "
                "the weights too. Remove one of the two."
            )
        origin = find_origin(model.hf_path, key="model.hf_path", base=model)
        if origin.is_run:
            raise ValueError(
                f"model.hf_path={model.hf_path}: must be a Hugging Face folder; it is a run "
                f"directory. Set model.init={model.hf_path} instead."
            )
        found = origin.model
    elif model.init not in ("auto", "random"):
        origin = find_origin(Path(model.init), key="model.init", base=model)
        found = origin.model.model_copy(update={"hf_path": None})
    else:
        return config
    kept = {"init": model.init, "lora": model.lora}
    return config.model_copy(update={"model": found.model_copy(update=kept)})


def _with_adapters(config: Config) -> Config:
    """Take rank, alpha and targets from the folder of the adapters."""
    lora = config.model.lora
    if lora.path is None:
        return config
    found = config.model.adapted(lora_from_peft(lora.path, lora))
    return config.model_copy(update={"model": found})


def with_keys(config: Config, keys: Mapping[str, Any]) -> Config:
    """Return the configuration with some dotted keys changed.

    Raises:
        ConfigError: the result is not valid.
    """
    values = config.model_dump()
    for key, value in keys.items():
        section, name = key.split(".")
        values[section][name] = value
    try:
        return Config.model_validate(values)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def dump_config(config: BaseModel) -> str:
    """Return the resolved tree as YAML."""
    return str(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))


def _read(path: Path | None) -> DictConfig:
    if path is None:
        return OmegaConf.create({})
    if not path.is_file():
        raise ConfigError(f"--config={path}: no such file. Give the path of a YAML file.")
    try:
        tree = OmegaConf.load(path)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            f"--config={path}:{line}: not valid YAML; {error.problem}. Fix the file."
        ) from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"--config={path}: not valid YAML; {first}. Fix the file.") from None
    except OSError:  # the file is a single word or number
        tree = OmegaConf.create([])
    if not isinstance(tree, DictConfig):
        raise ConfigError(
            f"--config={path}: must be a mapping of sections; it is not. Fix the file."
        )
    # Runs of earlier versions have neither prompt_fingerprint nor dtype.
    if tree.keys() >= _RUN_FACTS - {"prompt_fingerprint", "dtype"}:
        return OmegaConf.masked_copy(tree, [key for key in tree if key not in _RUN_FACTS])
    return tree


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    tree = OmegaConf.create({})
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            is_file = override.endswith((".yaml", ".yml")) or Path(override).is_file()
            meant = (
                f"Did you mean --config {override}?" if is_file else "Write for example run.seed=1."
            )
            raise ConfigError(f"{override}: an override must be key=value. {meant}")
        OmegaConf.update(tree, key, _parse_value(key, value), merge=True)
    return tree


def _parse_value(key: str, value: str) -> Any:
    """Read a value as YAML, but that of a text or a path as it stands.

    Names and folders such as `12:30`, `2024`, `d #2` and `${x}` mean themselves.
    """
    location = tuple(key.split("."))
    field = _keys(Config, location[:-1]).get(location[-1])
    # A list of sections may be written as one text.
    is_list = value.startswith(("[", "{"))
    if field is not None and (
        _is_text(field.annotation) or (_inner_model(field.annotation) and not is_list)
    ):
        if not value or (value.lower() in ("null", "none", "~") and _may_be_null(location)):
            return None
        return value.replace("${", "\\${")  # how OmegaConf writes it without looking for x
    try:
        return OmegaConf.create(f"value: {value}").value
    except (YAMLError, OmegaConfBaseException):
        return value


def _is_text(annotation: Any) -> bool:
    """Whether a key takes a text or a path, and no list or mapping of them."""
    if get_origin(annotation) in (tuple, dict):
        return False
    options = (annotation,) if isinstance(annotation, type) else get_args(annotation)
    return any(option in (str, Path) for option in options)


def _merge(file: DictConfig, overrides: DictConfig) -> Any:
    """Let overrides win and resolve interpolations such as `${run.seed}`."""
    try:
        return OmegaConf.to_container(OmegaConf.merge(file, overrides), resolve=True)
    except OmegaConfBaseException as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"{error.full_key}: must be resolvable; {first}. Refer to keys that the file or an "
            "override sets."
        ) from None
    except TypeError:
        raise ConfigError(
            "--config: an override cannot set a key inside a list. Override the whole list."
        ) from None


def _secrets_in(values: Any, where: str = "") -> Iterator[str]:
    """Find secrets that the configuration contains, for example through `${oc.env:...}`."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _secrets_in(value, f"{where}.{key}" if where else str(key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _secrets_in(value, f"{where}.{index}")
    elif isinstance(values, str) and redact(values) != values:
        yield (
            f"{where}={redact(values)}: must not contain a secret, which would be saved with the "
            "run; it has the value of an environment variable. Leave it in the environment."
        )


def _lines(error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = _RULES.get(problem["type"], problem["msg"])
        if where in _RENAMED:
            yield f"{where}: unknown key. It is now {_RENAMED[where]}: rename it."
        elif problem["type"] == "extra_forbidden":
            yield f"{where}: unknown key. {_nearest(problem['loc'])}"
        elif problem["type"] == "missing":
            yield f"{where}: must be given; it is not. Add it."
        elif problem["type"] == "value_error":
            yield message.removeprefix("Value error, ")
        else:
            unset = ", or write null to unset it" if _may_be_null(problem["loc"]) else ""
            shown = _YAML_WORDS.get(repr(problem["input"]), problem["input"])
            yield f"{where}={shown}: {message[0].lower()}{message[1:]}. Change the value{unset}."


def _nearest(location: tuple[int | str, ...]) -> str:
    section = ".".join(str(part) for part in location[:-1])
    siblings, name = list(_keys(Config, location[:-1])), str(location[-1])
    elsewhere = [
        f"{other}.{name}" for other in Config.model_fields if name in _keys(Config, [other])
    ]
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere)}?"
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {'.'.join(filter(None, [section, close[0]]))}?"
    return f"Known keys: {', '.join(siblings)}."


def _may_be_null(location: tuple[int | str, ...]) -> bool:
    field = _keys(Config, location[:-1]).get(str(location[-1]))
    return field is not None and NoneType in get_args(field.annotation)


def _keys(model: type[BaseModel], path: Iterable[int | str]) -> Mapping[str, FieldInfo]:
    for part in path:
        if isinstance(part, str) and part in model.model_fields:
            model = _inner_model(model.model_fields[part].annotation) or model
    return model.model_fields


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    """Find the section inside `Section`, `tuple[Section, ...]` or `Section | None`."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(_inner_model, get_args(annotation))), None)
