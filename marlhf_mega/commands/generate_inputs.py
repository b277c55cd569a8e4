"""What `marlhf generate` reads before ranks meet: the prompts, and the answers that are there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlhf_mega import durable
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.data import show_sources
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.files import data_hash
from marlhf_mega.train.inputs import Inputs, read_inputs
from marlhf_mega.train.resume import CONFIG, check_settings, settings_of, starts_afresh

BLOCK_SETTINGS = "settings.json"


def generate_inputs(config: Config, world_size: int) -> Inputs[Prompt]:
    """Read and check what the job needs.

    Raises:
        ValueError: something that the user has to fix.
    """
    inputs = read_inputs(config, "generate", world_size)
    check_blocks(saved_blocks(inputs.config), inputs)
    return inputs


def saved_blocks(config: Config) -> dict[str, Any] | None:
    """Return the settings of the answers to resume from, None if there are none."""
    file = config.run.dir / "responses" / BLOCK_SETTINGS
    if starts_afresh(config, file) or not file.is_file():
        return None
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return saved


def check_blocks(saved: Mapping[str, Any] | None, inputs: Inputs[Prompt]) -> None:
    """Refuse to resume answers of another configuration, file or tokenizer."""
    if saved is None:
        return
    config, tokenizer = inputs.config, inputs.tokenizer.prompt_fingerprint()
    if saved.get("tokenizer", tokenizer) != tokenizer:
        raise ConfigError(
            f"tokenizer.path={inputs.tokenizer_path}: must turn prompts into tokens as for the "
            f"answers that are there ({saved['tokenizer'][:12]}); its vocabulary, its template or "
            f"its special tokens are others ({tokenizer[:12]}). Use the same tokenizer or another "
            "run.dir."
        )
    check_settings(saved[CONFIG], config, "generate")
    found = data_hash(config.data.validation_path or ())
    if saved["data_hash"] != found:
        path = show_sources(config.data.validation_path)
        raise ConfigError(
            f"data.validation_path={path}: must hold the prompts of the answers that are there, "
            f"sha256 {saved['data_hash']}; it is {found}. Use the same file or another run.dir."
        )


def begin_blocks(folder: Path, inputs: Inputs[Prompt]) -> None:
    """Write settings, data hash and tokenizer for a resume."""
    config = inputs.config
    folder.mkdir(parents=True, exist_ok=True)
    if starts_afresh(config, folder / BLOCK_SETTINGS):
        for block in folder.glob("*.jsonl"):
            block.unlink()
    noted = {
        CONFIG: settings_of(config),
        "data_hash": data_hash(config.data.validation_path or ()),
        "tokenizer": inputs.tokenizer.prompt_fingerprint(),
    }
    durable.replace(folder / BLOCK_SETTINGS, json.dumps(noted))
