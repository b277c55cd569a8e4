"""Correct the planner's estimates by what a run has really used."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from marlhf_mega.config.checks import rollout_ranks
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.metrics.jsonl import read_lines
from marlhf_mega.plan.gpus import GIB
from marlhf_mega.plan.memory import WORKING
from marlhf_mega.plan.plan import Cluster, make_plan

_PEAK, _UPDATE_PEAK = "perf/peak_memory_gib", "perf/update_peak_memory_gib"
_TELLING = {"sft": "sft/loss", "reward": "reward/loss"}
"""Metrics that only these jobs write."""


def activation_factor(run: Path, cluster: Cluster) -> float:
    """Return measured over predicted bytes of what passes hold in an update.

    What models hold is exact, so the rest of the measured peak is due to activations. Runs of ppo
    have noted the update's peak of their worst rank, others that of the whole run on the first
    rank. Runs on GPUs only: on a CPU the metric counts the whole process.

    Args:
        run: directory of a finished run.
        cluster: device and assumptions; the run's own number of ranks counts.

    Raises:
        ConfigError: the run has no peaks, or was not on GPUs.
    """
    values, metrics = _read(run)
    layout = str(values.get("layout", ""))
    if "cuda" not in layout:
        raise ConfigError(
            f"--calibrate={run}: must be a run on GPUs; its layout is {layout or 'not known'}. "
            "Name another run."
        )
    config = Config.model_validate({k: v for k, v in values.items() if k in Config.model_fields})
    seen = {name for line in metrics for name in line}
    job = next((job for job, name in _TELLING.items() if name in seen), "ppo")
    world = int(layout.split()[0]) + rollout_ranks(config, job)
    own = replace(cluster, nodes=1, gpus_per_node=world, activation_factor=1.0)
    stages = make_plan(config, job, own).stages
    metric, stage = _PEAK, stages[0]
    if _UPDATE_PEAK in seen:
        metric, stage = _UPDATE_PEAK, max(stages, key=lambda stage: stage.total("update"))
    measured = max(float(line[metric]) for line in metrics if metric in line) * GIB
    held = stage.phases["update"]
    predicted = sum(size for name, size in held.items() if name in WORKING)
    exact = sum(held.values()) - predicted
    return max(measured - exact, 0.0) / predicted


def _read(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"--calibrate={run}: must be a run directory; it has no config.yaml. Give run.dir of "
            "a run."
        )
    values = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    assert isinstance(values, dict)
    metrics = list(read_lines(run / "metrics.jsonl"))
    if not any(_PEAK in line for line in metrics):
        raise ConfigError(
            f"--calibrate={run}: must have measured its memory; no line of metrics.jsonl has "
            f"{_PEAK}. Let it take a step."
        )
    return {str(key): value for key, value in values.items()}, metrics
