"""Generate on held-out prompts and judge: reward score, gold rule, KL from a reference."""

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.config.schema import Config, RewardTerm
from marlhf_mega.data.datasets import ExampleBuilder, Prompt
from marlhf_mega.data.files import Row
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.experience.forward import forward_rows
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.metrics.writers import Sample, SamplesWriter
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.offload import Offload
from marlhf_mega.models.roles import LogprobStep
from marlhf_mega.parallel.collectives import gather_objects_over_data
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.reshard import ReshardedGenerator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.types import Rollout
from marlhf_mega.train.build import (
    build_generator,
    build_model,
    check_scalar_models,
    policy_origin,
    reward_origins,
)
from marlhf_mega.train.inputs import Inputs, read_inputs
from marlhf_mega.train.output import write_run_directory

logger = logging.getLogger(__name__)

EVALUATION_STEP = 1 << 40
"""Held-out prompts are always answered with the same draws, so that steps can be compared."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Held-out results of all ranks, in the order of the prompts."""

    metrics: dict[str, float]
    scores: list[float]
    """Raw scores, NaN where there is none."""
    samples: list[Sample]


class Evaluator:
    """Judges a policy on the first `evaluate.num_prompts` held-out prompts."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        scorer: Scorer | None,
        generator: Generator | ReshardedGenerator,
        mesh: Mesh,
        *,
        offload: Offload | None = None,
    ) -> None:
        self.offload = offload or Offload()
        self.config, self.tokenizer, self.mesh, self.scorer = config, tokenizer, mesh, scorer
        self.generator = generator
        self.prompts = list(prompts[: config.evaluate.num_prompts])
        gold = config.evaluate.gold
        self.gold = (
            None
            if gold is None
            else Scorer(
                [RewardTerm(source=gold)],
                [],
                tokenizer,
                mesh,
                limit=MicrobatchLimit(rows=config.evaluate.batch_size),
                key="evaluate.gold",
            )
        )

    def judge(self, chunks: Sequence[StageModel], reference: Sequence[StageModel] | None) -> Judged:
        """Generate and judge. All ranks call it.

        Args:
            chunks: the policy that the generator generates with.
            reference: for the KL; none: no KL.
        """
        mesh, settings = self.mesh, self.config.evaluate
        own = list(range(mesh.dp_rank, len(self.prompts), mesh.dp_size))
        rollout = self.generator.generate(
            [self.prompts[i].prompt_ids for i in own],
            own,
            rule=SamplingRule(
                temperature=settings.temperature,
                top_k=self.config.rollout.top_k,
                top_p=self.config.rollout.top_p,
            ),
            max_response_tokens=self.config.rollout.max_response_tokens,
            seed=self.config.run.seed,
            step=EVALUATION_STEP,
            slots=max(1, settings.batch_size // self.generator.mesh.dp_size),
        )
        rows = [prompt_row(self.prompts[i]) for i in own]
        with self.offload.present("rewards"):
            scores = self._scores(self.scorer, rollout, rows)
        with self.offload.present("reference"):
            divergence = self._divergence(chunks, reference, rollout)
        columns = {
            "eval/score": scores,
            "eval/gold": self._scores(self.gold, rollout, rows),
            "eval/kl": divergence,
            "eval/response_tokens": torch.tensor([float(len(r)) for r in rollout.responses]),
            "eval/truncated_fraction": torch.tensor([float(not f) for f in rollout.finished]),
        }
        values = {name: column.tolist() for name, column in columns.items() if column is not None}
        texts = list(zip(own, rollout.responses, strict=True))
        return self._combine(gather_objects_over_data((values, texts), mesh))

    def close(self) -> None:
        """End the gold rule's process."""
        if self.gold is not None:
            self.gold.close()

    def _scores(
        self, scorer: Scorer | None, rollout: Rollout, rows: Sequence[Mapping[str, Any]]
    ) -> Tensor | None:
        if scorer is None or not scorer.terms:
            return None
        scores = scorer.score(rollout, rows)
        if scores.errors and self.mesh.is_replica_leader:
            what = "gold" if scorer is self.gold else "reward"
            reason, _ = Counter(scores.errors).most_common(1)[0]
            count = int((~scores.valid).sum())
            logger.warning(
                "%d of %d held-out responses have no %s score: %s", count, len(rows), what, reason
            )
        return torch.where(scores.valid, scores.scores, torch.nan)

    def _divergence(
        self,
        chunks: Sequence[StageModel],
        reference: Sequence[StageModel] | None,
        rollout: Rollout,
    ) -> Tensor | None:
        """Return [batch]: the sum over tokens of log p / p_reference, at the same temperature."""
        if reference is None:
            return None
        temperature = self.config.evaluate.temperature or 1.0
        both = [
            forward_rows(
                model,
                rollout.prompts,
                rollout.responses,
                mesh=self.mesh,
                limit=MicrobatchLimit.of_scoring(self.config.ppo),
                run=LogprobStep(temperature),
                leading=(2,),
            )[0]
            for model in (chunks, reference)
        ]
        return (both[0] - both[1]).sum(1)

    def _combine(self, parts: list[tuple[dict[str, list[float]], Any]]) -> Judged:
        metrics: dict[str, float] = {}
        for name in parts[0][0]:
            values = torch.tensor([v for part in parts for v in part[0][name]], dtype=torch.float64)
            values = values[~values.isnan()]
            if not len(values):
                continue
            suffix = "_mean" if name in ("eval/score", "eval/gold") else ""
            metrics[name + suffix] = values.mean().item()
            if len(values) > 1:
                metrics[name + "_stderr"] = (values.std() / len(values) ** 0.5).item()
        found = [
            (index, ids, _at(values, "eval/score", k), _at(values, "eval/gold", k))
            for values, texts in parts
            for k, (index, ids) in enumerate(texts)
        ]
        found.sort(key=lambda item: item[0])
        samples = [
            make_sample(self.prompts[index].prompt, ids, self.tokenizer, score=score, gold=gold)
            for index, ids, score, gold in found
        ]
        nan = float("nan")
        return Judged(
            metrics=metrics,
            scores=[nan if score is None else score for _, _, score, _ in found],
            samples=samples,
        )


def _at(values: Mapping[str, list[float]], name: str, position: int) -> float | None:
    return values[name][position] if name in values else None


def prompt_row(prompt: Prompt) -> dict[str, Any]:
    """Return the data row with the prompt as text, as rules get it."""
    return {**prompt.row, "prompt": prompt.prompt}


def make_sample(
    prompt: str,
    response: Sequence[int],
    tokenizer: Tokenizer,
    *,
    action_starts: Sequence[int] = (),
    score: float | None = None,
    gold: float | None = None,
) -> Sample:
    """Turn token ids into the texts that people read."""
    text, spans = tokenizer.decode(response), tokenizer.offsets(response)

    def known(value: float | None) -> float | None:
        return None if value is None or value != value else value

    return Sample(
        prompt=prompt,
        tokens=[text[start:end] for start, end in spans],
        action_starts=list(action_starts),
        score=known(score),
        gold=known(gold),
    )


def prompt_examples(builder: ExampleBuilder, rows: Sequence[Row]) -> list[Prompt]:
    """Tokenise prompts."""
    return builder.prompts(rows)


def evaluate_inputs(config: Config, world_size: int) -> Inputs[Prompt]:
    """Read what evaluate needs; raises ValueError for anything the user has to mend."""
    inputs = read_inputs(
        config, "evaluate", world_size=world_size, kind="prompts", build=prompt_examples
    )
    policy_origin(inputs.config)
    check_scalar_models(inputs.config, inputs.tokenizer, world_size, critic=False)
    return inputs


def run_evaluate(inputs: Inputs[Prompt], mesh: Mesh) -> dict[str, float]:
    """Judge the policy of `model.init` or `model.hf_path`; write a summary and samples."""
    config, tokenizer = inputs.config, inputs.tokenizer
    policy = build_model(
        config.model, config, mesh, head="language", origin=policy_origin(config), name="policy"
    )
    rewards = [
        build_model(origin.model, config, mesh, head="scalar", origin=origin, name="reward")
        for origin in reward_origins(config, tokenizer)
    ]
    scorer = Scorer(
        config.reward.source,
        rewards,
        tokenizer,
        mesh,
        limit=MicrobatchLimit.of_scoring(config.ppo),
    )
    generator, _ = build_generator(policy, config, mesh, eos_id=tokenizer.eos_id)
    evaluator = Evaluator(config, inputs.validation, tokenizer, scorer, generator, mesh)
    try:
        judged = evaluator.judge(policy, None)
    finally:
        evaluator.close()
        scorer.close()
    if mesh.rank == 0:
        write_run_directory(config, tokenizer, inputs.tokenizer_path, mesh)
        with SamplesWriter(config.run.dir, first_step=0) as samples:
            samples.write(0, judged.samples if config.logging.samples else [])
        summary = json.dumps(judged.metrics, indent=2, allow_nan=False)
        file = config.run.dir / "evaluation.json"
        file.write_text(summary + "\n", encoding="utf-8")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in sorted(judged.metrics.items()))
        logger.info("%s: %s", file, shown)
    return judged.metrics
