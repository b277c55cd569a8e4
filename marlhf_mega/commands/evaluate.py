"""`marlhf evaluate`: answer held-out prompts and judge the answers; a summary and samples."""

import json
import sys
from collections.abc import Mapping
from contextlib import closing

from marlhf_mega.checkpoint.weights import fill_from
from marlhf_mega.config.sections.run import START
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.evaluation import Judged
from marlhf_mega.metrics.glossary import WIN_RATES, is_beside, lookup, order
from marlhf_mega.metrics.jsonl import JsonLines
from marlhf_mega.metrics.progress import show_before_after, show_results
from marlhf_mega.metrics.writers import SamplesWriter
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.report.page import report
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.train.generation import build_evaluator
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.origins import other_policy_origin
from marlhf_mega.train.output import write_run_directory


def run_evaluate(inputs: Inputs[Prompt], mesh: Mesh, watchdog: Watchdog) -> dict[str, float]:
    """Judge the policy of `model.init` or `model.hf_path`; write a summary, samples and a report.

    With `evaluate.against` the weights of another policy then replace its own, and are judged on
    the same prompts with the same draws.
    """
    config = inputs.config
    limit = MicrobatchLimit.of_scoring(config.ppo)
    policy, evaluator = build_evaluator(inputs, mesh, limit=limit)
    other = other_policy_origin(config, inputs.tokenizer)
    others: Judged | None = None
    watchdog.enter("evaluate")
    try:
        judged = evaluator.judge(policy, None)
        if other is not None:
            watchdog.enter(START)
            once = config.checkpoint.import_once
            fill_from(other, policy, mesh, seed=config.run.seed, import_once=once)
            watchdog.enter("evaluate")
            others = evaluator.judge(policy, None)
    finally:
        evaluator.close()
    metrics = judged.results.metrics
    if others is not None:
        metrics |= judged.results.against(others.results)
    if mesh.rank == 0:
        write_run_directory(config, inputs.tokenizer, inputs.tokenizer_path, mesh)
        with closing(SamplesWriter(config.run.dir, first_step=0)) as samples:
            samples.write(0, judged.samples if config.logging.samples else [])
        with closing(JsonLines(config.run.dir / "metrics.jsonl", first_step=0)) as lines:
            lines.write({"step": 0, **metrics})
        file = config.run.dir / "evaluation.json"
        file.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        report([config.run.dir], config.run.dir / "report.html")
        if others is None:
            show_results(str(file), metrics)
        else:
            _show_comparison(metrics, others.results.metrics, against=str(config.evaluate.against))
    return metrics


def _show_comparison(
    metrics: Mapping[str, float], others: Mapping[str, float], *, against: str
) -> None:
    """Show both policies beside each other, and who wins how often."""
    names = sorted((name for name in others if not is_beside(name)), key=order)
    show_before_after(others, metrics, names, columns=("other", "this policy"))
    for judge, name in WIN_RATES.items():
        if name in metrics:
            rate, low, high, ties = (
                f"{100 * metrics[key]:.1f} %"
                for key in (name, f"{name}_low", f"{name}_high", f"{name}_ties")
            )
            sys.stdout.write(
                f"win rate over {against} by {lookup(judge).label}: {rate} "
                f"(95 % interval {low} to {high}; {ties} ties, each half a win)\n"
            )
