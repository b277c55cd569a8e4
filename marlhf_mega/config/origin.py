"""Where a model's weights come from: a run directory or a Hugging Face folder."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from pydantic import ValidationError

from marlhf_mega.config.hf import model_config_from_hf
from marlhf_mega.config.lora import LoraConfig
from marlhf_mega.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Weights on disk and their shape."""

    path: Path
    is_run: bool
    """Whether it is a run directory; otherwise it is a Hugging Face folder."""
    model: ModelConfig
    """Without adapters: those of a run are merged into its weights."""
    tokenizer_fingerprint: str | None
    """Fingerprint of the tokenizer that a run was trained with. None means not known."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters that a run trained; its checkpoints hold these, and not the rest of the weights."""
    base: "Origin | None" = None
    """Where the rest of the weights of such a run comes from; none: they are random."""
    seed: int = 0
    """Of such a run, from which random weights follow."""


def find_origin(path: Path, *, key: str, base: ModelConfig | None = None) -> Origin:
    """Tell what a path contains and read its architecture.

    Args:
        path: a run directory or a Hugging Face folder.
        key: the config key that names it.
        base: the user's model section, for a Hugging Face folder.

    Raises:
        ValueError: the path has neither.
    """
    run_config = path / "config.yaml"
    if run_config.is_file():
        return _run_origin(path, run_config, key)
    if (path / "config.json").is_file():
        model = model_config_from_hf(path, base or ModelConfig(), key=key)
        return Origin(path=path, is_run=False, model=model.plain, tokenizer_fingerprint=None)
    what = "has neither config.yaml nor config.json" if path.is_dir() else "no such folder"
    raise ValueError(
        f"{key}={path}: must be a run directory or a Hugging Face folder; {what}. "
        "Check the path, or train that model first."
    )


def first_origin(model: ModelConfig, *, of: str = "") -> Origin | None:
    """Return where the first weights of a `model` section come from; none: they are random.

    Args:
        model: the section.
        of: which run's it is, for messages.

    Raises:
        ValueError: the path that it names has no model.
    """
    if model.init not in ("auto", "random"):
        return find_origin(Path(model.init), key=f"model.init{of}")
    if model.hf_path is not None and model.init == "auto":
        return find_origin(model.hf_path, key=f"model.hf_path{of}", base=model)
    return None


def run_fingerprint(run_dir: Path, name: str = "tokenizer_fingerprint") -> str | None:
    """Return a fingerprint of a run's tokenizer, None if its config.yaml does not have it."""
    path = run_dir / "config.yaml"
    values = OmegaConf.load(path) if path.is_file() else {}
    found: str | None = values.get(name)
    return found


def _run_origin(path: Path, run_config: Path, key: str) -> Origin:
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir() or not any(checkpoints.iterdir()):
        raise ValueError(
            f"{key}={path}: must have a checkpoint; the run has none. Let it reach its first save, "
            "or use another run."
        )
    values = OmegaConf.to_container(OmegaConf.load(run_config))
    try:
        assert isinstance(values, dict)
        model = ModelConfig.model_validate(values["model"])
    except (AssertionError, KeyError, ValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else "not a mapping"
        raise ValueError(
            f"{key}={path}: its config.yaml must describe the model; {reason}. Fix the file, or "
            "use another run."
        ) from None
    size = (values.get("reward_model") or {}).get("latent_size", 0)
    if size:
        raise ValueError(
            f"{key}={path}: must be a model that needs no user; this one scores by what a user "
            f"prefers, reward_model.latent_size={size}. Use another run."
        )
    base, seed = None, 0
    if model.lora.is_on:
        base = first_origin(model, of=f" of {path}")
        seed = values["run"]["seed"]
    return Origin(
        path=path,
        is_run=True,
        model=model.plain,
        tokenizer_fingerprint=values.get("tokenizer_fingerprint"),
        lora=model.lora,
        base=base,
        seed=seed,
    )
