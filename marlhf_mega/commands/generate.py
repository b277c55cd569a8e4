"""`marlhf generate`: answer all prompts of a file; `marlhf offline` and `sft` read the answers."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from marlhf_mega import durable
from marlhf_mega.commands.generate_inputs import (
    BLOCK_SETTINGS,
    begin_blocks,
    check_blocks,
    saved_blocks,
)
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.files import write_jsonl
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
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.output import write_run_directory
from marlhf_mega.train.resume import starts_afresh

logger = logging.getLogger(__name__)

BLOCK_PROMPTS = 1024
"""Prompts answered between two writes: the most that an interrupted job loses."""


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
    afresh = broadcast_object(starts_afresh(config, folder / BLOCK_SETTINGS))
    saved = broadcast_object(saved_blocks(config))
    check_blocks(saved, inputs)
    if mesh.rank == 0:
        if saved is None:
            begin_blocks(folder, inputs)
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
