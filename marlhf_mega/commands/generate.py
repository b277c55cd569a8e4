"""`marlhf generate`: answer all prompts of a file; `marlhf offline` and `sft` read the answers."""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from marlhf_mega import durable
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.data import show_sources
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.files import data_hash, write_jsonl
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.evaluation import prompt_row
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.models.forward import make_batches
from marlhf_mega.parallel.collectives import broadcast_object, gather_objects
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.preemption import StopRequest
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.rollout.protocol import ResponseGenerator
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.train.generation import build_judged_policy
from marlhf_mega.train.inputs import Inputs, read_inputs
from marlhf_mega.train.output import write_run_directory
from marlhf_mega.train.resume import CONFIG, check_settings, settings_of, starts_afresh

logger = logging.getLogger(__name__)

_SETTINGS = "settings.json"

BLOCK_PROMPTS = 1024
"""Prompts answered between two writes: the most that an interrupted job loses."""


def generate_inputs(config: Config, world_size: int) -> Inputs[Prompt]:
    """Read and check what the job needs.

    Raises:
        ValueError: something that the user has to fix.
    """
    inputs = read_inputs(config, "generate", world_size)
    _check_blocks(_saved(inputs.config), inputs)
    return inputs


def run_generate(inputs: Inputs[Prompt], mesh: Mesh, watchdog: Watchdog) -> list[Path]:
    """Write JSON Lines to `run.dir`/responses: the rows of the prompts with their answers.

    Each prompt has `rollout.samples_per_prompt` consecutive lines, in the file's order. They add
    `response` and `finished` to the prompt's row, and `reward` if `reward.source` is set (null if a
    response could not be scored). An interrupted job resumes after its last complete block, with
    the same random draws, unless `checkpoint.resume` is `never`.

    Returns:
        The files, one per block of prompts.

    Raises:
        ConfigError: blocks are there of other settings or prompts.
    """
    config, tokenizer = inputs.config, inputs.tokenizer
    folder = config.run.dir / "responses"
    afresh = broadcast_object(starts_afresh(config, folder / _SETTINGS))
    saved = broadcast_object(_saved(config))
    _check_blocks(saved, inputs)
    if mesh.rank == 0:
        if saved is None:
            _begin_blocks(folder, inputs)
        write_run_directory(config, tokenizer, inputs.tokenizer_path, mesh)
    _, scorer, generator = build_judged_policy(config, tokenizer, mesh)
    request = StopRequest(config, mesh)
    files = []
    for start in range(0, len(inputs.validation), BLOCK_PROMPTS):
        block = range(start, min(start + BLOCK_PROMPTS, len(inputs.validation)))
        file = folder / f"{start:09d}.jsonl"
        files.append(file)
        if not afresh and broadcast_object(file.is_file()):
            continue
        num_answers = len(block) * config.rollout.samples_per_prompt
        watchdog.enter("rollout", times=-(-num_answers // config.rollout.batch_size))
        rows = answer(inputs, block, generator, scorer, mesh)
        if mesh.rank == 0:
            with durable.replacing(file) as partial:
                write_jsonl(partial, rows)
            logger.info("generate: %d of %d prompts", block.stop, len(inputs.validation))
        if request.is_made() and block.stop < len(inputs.validation):
            raise request.end(block.stop, of="prompt")
    scorer.close()
    return files


def _saved(config: Config) -> dict[str, Any] | None:
    """Return the settings of the answers to resume from, None if there are none."""
    file = config.run.dir / "responses" / _SETTINGS
    if starts_afresh(config, file) or not file.is_file():
        return None
    saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return saved


def _check_blocks(saved: Mapping[str, Any] | None, inputs: Inputs[Prompt]) -> None:
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


def _begin_blocks(folder: Path, inputs: Inputs[Prompt]) -> None:
    """Write settings, data hash and tokenizer for a resume."""
    config = inputs.config
    folder.mkdir(parents=True, exist_ok=True)
    if starts_afresh(config, folder / _SETTINGS):
        for block in folder.glob("*.jsonl"):
            block.unlink()
    noted = {
        CONFIG: settings_of(config),
        "data_hash": data_hash(config.data.validation_path or ()),
        "tokenizer": inputs.tokenizer.prompt_fingerprint(),
    }
    durable.replace(folder / _SETTINGS, json.dumps(noted))


def answer(
    inputs: Inputs[Prompt],
    block: range,
    generator: ResponseGenerator,
    scorer: Scorer,
    mesh: Mesh,
) -> list[dict[str, Any]]:
    """Answer a block of prompts. All ranks call it and get all rows."""
    config, settings = inputs.config, inputs.config.rollout
    first, last = (settings.samples_per_prompt * i for i in (block.start, block.stop))
    own = list(range(first + mesh.dp_rank, last, mesh.dp_size))
    prompts = [inputs.validation[i // settings.samples_per_prompt] for i in own]
    slots = settings.slots or max(1, settings.batch_size // generator.mesh.dp_size)
    options = RolloutOptions.of(config, step=0, slots=slots)
    rollout = generator.generate([p.prompt_ids for p in prompts], own, options)
    rows = [
        {
            # A reward in the prompt's row belongs to another response.
            **{name: value for name, value in prompt.row.items() if name != "reward"},
            "response": inputs.tokenizer.response_text(response),
            "finished": finished,
        }
        for prompt, response, finished in zip(
            prompts, rollout.responses, rollout.finished, strict=True
        )
    ]
    errors: list[str] = []
    if scorer.terms:
        limit = MicrobatchLimit.of_scoring(config.ppo)
        batches = make_batches(rollout.prompts, rollout.responses, limit=limit, mesh=mesh)
        found = scorer.score(rollout.responses, batches, [prompt_row(p) for p in prompts])
        errors = found.errors
        for row, score, valid in zip(
            rows, found.scores.tolist(), found.valid.tolist(), strict=True
        ):
            row["reward"] = score if valid else None
    parts = gather_objects((list(zip(own, rows, strict=True)), errors), mesh.groups.dp)
    numbered = [pair for pairs, _ in parts for pair in pairs]
    reasons = Counter(error for _, found in parts for error in found)
    if reasons and mesh.rank == 0:
        count = sum(row.get("reward", 0) is None for _, row in numbered)
        reason, _ = reasons.most_common(1)[0]
        logger.warning("%d of %d responses have no reward: %s", count, len(numbered), reason)
    return [row for _, row in sorted(numbered, key=lambda pair: pair[0])]
