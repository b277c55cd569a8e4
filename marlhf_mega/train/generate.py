"""Answer every prompt of a file: JSON Lines that `marlhf offline` and `marlhf sft` can read."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlhf_mega.checkpoint import durable
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.files import content_hash, write_jsonl
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.parallel.collectives import gather_objects_over_data, share_from_first
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.reshard import ReshardedGenerator
from marlhf_mega.train import rollouts
from marlhf_mega.train.build import (
    build_generator,
    build_model,
    check_scalar_models,
    policy_origin,
    reward_origins,
)
from marlhf_mega.train.evaluate import prompt_examples, prompt_row
from marlhf_mega.train.inputs import Inputs, read_inputs
from marlhf_mega.train.output import write_run_directory
from marlhf_mega.train.resume import CONFIG, check_settings, settings_of

logger = logging.getLogger(__name__)

_SETTINGS = "settings.json"

BLOCK_PROMPTS = 1024
"""Prompts answered between two writes: what an interrupted job loses at most."""


def generate_inputs(config: Config, world_size: int) -> Inputs[Prompt]:
    """Read what generate needs; raises ValueError for anything the user has to mend."""
    inputs = read_inputs(
        config, "generate", world_size=world_size, kind="prompts", build=prompt_examples
    )
    policy_origin(inputs.config)
    check_scalar_models(inputs.config, inputs.tokenizer, world_size, critic=False)
    _check_blocks(_saved(inputs.config), inputs.config)
    return inputs


def run_generate(inputs: Inputs[Prompt], mesh: Mesh) -> list[Path]:
    """Write `run.dir`/responses: JSON Lines of the prompts' rows with what was answered.

    A prompt has `rollout.samples_per_prompt` lines, one after the other, in the file's order;
    `response` and `finished` are added to its row, and `reward` if `reward.source` is set (null
    for a response that could not be scored). A job that was interrupted goes on behind the blocks
    that are there, with the draws it would have made, unless `checkpoint.resume` is `never`.

    Returns:
        The files, one per block of prompts.

    Raises:
        ConfigError: blocks are there of other settings or prompts.
    """
    config, tokenizer = inputs.config, inputs.tokenizer
    folder = config.run.dir / "responses"
    saved = share_from_first(_saved(config), mesh)
    _check_blocks(saved, config)
    if mesh.rank == 0:
        if saved is None:
            _begin_blocks(folder, config)
        write_run_directory(config, tokenizer, inputs.tokenizer_path, mesh)
    policy = build_model(
        config.model, config, mesh, head="language", origin=policy_origin(config), name="policy"
    )
    models = [
        build_model(origin.model, config, mesh, head="scalar", origin=origin, name="reward")
        for origin in reward_origins(config, tokenizer)
    ]
    scorer = Scorer(
        config.reward.source,
        models,
        tokenizer,
        mesh,
        limit=MicrobatchLimit.of_scoring(config.ppo),
    )
    generator, _ = build_generator(policy, config, mesh, eos_id=tokenizer.eos_id)
    files = []
    for start in range(0, len(inputs.validation), BLOCK_PROMPTS):
        block = range(start, min(start + BLOCK_PROMPTS, len(inputs.validation)))
        file = folder / f"{start:09d}.jsonl"
        files.append(file)
        if config.checkpoint.resume != "never" and share_from_first(file.is_file(), mesh):
            continue
        rows = answer(inputs, block, generator, scorer, mesh)
        if mesh.rank == 0:
            # Under its name the file is whole.
            partial = file.with_suffix(".part")
            write_jsonl(partial, rows)
            partial.replace(file)
            logger.info("generate: %d of %d prompts", block.stop, len(inputs.validation))
    scorer.close()
    return files


def _saved(config: Config) -> dict[str, Any] | None:
    """Return what is noted about the answers to go on from; none: there are none."""
    file = config.run.dir / "responses" / _SETTINGS
    if config.checkpoint.resume == "never" or not file.is_file():
        return None
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return saved


def _check_blocks(saved: Mapping[str, Any] | None, config: Config) -> None:
    """Refuse to add to answers of another configuration or file."""
    if saved is None:
        return
    check_settings(saved[CONFIG], config, "generate")
    data_hash = _data_hash(config)
    if saved["data_hash"] != data_hash:
        raise ConfigError(
            f"data.validation_path={config.data.validation_path}: must hold the prompts of the "
            f"answers that are there, sha256 {saved['data_hash']}; it is {data_hash}. Use the same "
            "file or another run.dir."
        )


def _begin_blocks(folder: Path, config: Config) -> None:
    """Note settings and file for the next start."""
    folder.mkdir(parents=True, exist_ok=True)
    if config.checkpoint.resume == "never":
        for block in folder.glob("*.jsonl"):
            block.unlink()
    noted = {CONFIG: settings_of(config), "data_hash": _data_hash(config)}
    durable.replace(folder / _SETTINGS, json.dumps(noted))


def _data_hash(config: Config) -> str:
    assert config.data.validation_path is not None
    return content_hash(config.data.validation_path)


def answer(
    inputs: Inputs[Prompt],
    block: range,
    generator: Generator | ReshardedGenerator,
    scorer: Scorer,
    mesh: Mesh,
) -> list[dict[str, Any]]:
    """Answer some prompts; every rank calls it and gets all rows."""
    config, settings = inputs.config, inputs.config.rollout
    first, last = (settings.samples_per_prompt * i for i in (block.start, block.stop))
    own = list(range(first + mesh.dp_rank, last, mesh.dp_size))
    prompts = [inputs.validation[i // settings.samples_per_prompt] for i in own]
    rollout = rollouts.generate(
        generator,
        [p.prompt_ids for p in prompts],
        own,
        config,
        step=0,
        slots=settings.slots or max(1, settings.batch_size // generator.mesh.dp_size),
    )
    rows = [
        {
            # A reward that is there is that of another response.
            **{name: value for name, value in prompt.row.items() if name != "reward"},
            "response": inputs.tokenizer.decode(response),
            "finished": finished,
        }
        for prompt, response, finished in zip(
            prompts, rollout.responses, rollout.finished, strict=True
        )
    ]
    if scorer.terms:
        found = scorer.score(rollout, [prompt_row(p) for p in prompts])
        for row, score, valid in zip(
            rows, found.scores.tolist(), found.valid.tolist(), strict=True
        ):
            row["reward"] = score if valid else None
    parts = gather_objects_over_data(list(zip(own, rows, strict=True)), mesh)
    return [row for _, row in sorted((p for part in parts for p in part), key=lambda p: p[0])]
