"""What `preference` reads before ranks meet, and what its rows must have."""

from collections.abc import Sequence

from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.data import show_sources
from marlhf_mega.config.sections.offline import PreferenceConfig
from marlhf_mega.data.datasets import PreferencePair
from marlhf_mega.train.inputs import Inputs, read_inputs


def preference_inputs(config: Config, world_size: int) -> Inputs[PreferencePair]:
    """Read what the job reads; raises ValueError for anything that the user has to fix."""
    inputs: Inputs[PreferencePair] = read_inputs(config, "preference", world_size)
    if config.preference.is_online:
        return inputs
    check_labels(inputs.train, config.preference, show_sources(config.data.train_path))
    if inputs.validation:
        path = show_sources(config.data.validation_path)
        check_labels(inputs.validation, config.preference, path)
    return inputs


def check_labels(pairs: Sequence[PreferencePair], settings: PreferenceConfig, path: str) -> None:
    """Refuse rows without what the loss reads, or with what it does not.

    Raises:
        ConfigError: with the key and the file.
    """
    key, size = f"preference.loss={settings.loss}", settings.num_responses
    missing = {
        "bfpo": ("chosen_safe and rejected_safe", lambda pair: len(pair.safe) < 2),
        "xpo": ("from_reference", lambda pair: not pair.from_reference),
    }
    field, is_missing = missing.get(settings.loss, ("", lambda pair: False))
    if any(map(is_missing, pairs)):
        raise ConfigError(
            f"{key}: needs {field} in every row; not all rows of {path} have it. Add it, name it "
            "with data.fields, or use another loss."
        )
    if settings.loss == "pro" and (counts := {len(pair.responses) for pair in pairs} - {size}):
        raise ConfigError(
            f"preference.num_responses={size}: must be the number of responses in every row; "
            f"{path} has rows of {min(counts)}. Change it, or leave these rows out."
        )
    if settings.loss != "dpo" and any(pair.chosen_probability != 1 for pair in pairs):
        raise ConfigError(
            f"{key}: takes every label as certain; {path} has rows with chosen_probability. Remove "
            "the field, or use preference.loss=dpo."
        )
    if settings.loss == "refuel":
        _check_margins(pairs, key, path)
    elif settings.margin != "none":
        _check_margins(pairs, f"preference.margin={settings.margin}", path)


def _check_margins(pairs: Sequence[PreferencePair], key: str, path: str) -> None:
    margins = [pair.margin for pair in pairs]
    if not any(margins):
        raise ConfigError(
            f"{key}: needs rows with a margin; none of {path} has one. Add the field, name it with "
            "data.fields, or remove the key."
        )
    if key.endswith("=weight") and min(margins) < 0:
        raise ConfigError(
            f"{key}: needs margins of at least 0; the least of {path} is {min(margins):g}. Swap "
            "the responses of such rows, or remove the key."
        )
