"""Where a model's weights come from: a run directory of ours or a Hugging Face folder."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from pydantic import ValidationError

from marlhf_mega.config.hf import model_config_from_hf
from marlhf_mega.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Weights on disk and the shape they have."""

    path: Path
    is_run: bool
    """A run directory; otherwise a Hugging Face folder."""
    model: ModelConfig
    tokenizer_fingerprint: str | None
    """Of the tokenizer that a run was trained with; none: not known."""


def find_origin(path: Path, *, key: str, base: ModelConfig | None = None) -> Origin:
    """Say what lies at a path and read its architecture.

    Args:
        path: a run directory or a Hugging Face folder.
        key: the config key that named it.
        base: for a Hugging Face folder, keys that the user may set beside it.

    Raises:
        ValueError: there is neither.
    """
    run_config = path / "config.yaml"
    if run_config.is_file():
        return _run_origin(path, run_config, key)
    if (path / "config.json").is_file():
        model = model_config_from_hf(path, base or ModelConfig(), key=key)
        return Origin(path=path, is_run=False, model=model, tokenizer_fingerprint=None)
    what = "has neither config.yaml nor config.json" if path.is_dir() else "no such folder"
    raise ValueError(
        f"{key}={path}: must be a run directory or a Hugging Face folder; {what}. "
        "Check the path, or train that model first."
    )


def run_fingerprint(run_dir: Path) -> str | None:
    """Return the fingerprint of a run's tokenizer, where its config.yaml says it."""
    path = run_dir / "config.yaml"
    values = OmegaConf.load(path) if path.is_file() else {}
    found: str | None = values.get("tokenizer_fingerprint")
    return found


def _run_origin(path: Path, run_config: Path, key: str) -> Origin:
    checkpoints = path / "checkpoints"
    if not checkpoints.is_dir() or not any(checkpoints.iterdir()):
        raise ValueError(
            f"{key}={path}: the run has no checkpoint. Let it reach its first save, or name "
            "another run."
        )
    values = OmegaConf.to_container(OmegaConf.load(run_config))
    try:
        assert isinstance(values, dict)
        model = ModelConfig.model_validate(values["model"])
    except (AssertionError, KeyError, ValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else "not a mapping"
        raise ValueError(
            f"{key}={path}: its config.yaml must describe the model; {reason}. Mend the file or "
            "name another run."
        ) from None
    fingerprint = values.get("tokenizer_fingerprint")
    return Origin(path=path, is_run=True, model=model, tokenizer_fingerprint=fingerprint)
