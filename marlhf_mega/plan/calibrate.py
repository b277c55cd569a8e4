"""Corrects the planner's estimates with the memory that a run used."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from marlhf_mega.config.checks import rollout_ranks
from marlhf_mega.config.limits import GIB
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.metrics.jsonl import read_lines
from marlhf_mega.plan.memory import WORKING
from marlhf_mega.plan.plan import Cluster, make_plan

_PEAK, _UPDATE_PEAK = "perf/peak_memory_gib", "perf/update_peak_memory_gib"
_TELLING = {"sft": "sft/loss", "reward": "reward/loss", "preference": "preference/loss"}
"""Metrics by which these jobs are recognised."""


def activation_factor(run: Path, cluster: Cluster) -> float:
    """Return the ratio of measured to predicted activation bytes of an update.

    The memory of models is exact, so the rest of the measured peak is due to activations. Runs of
    ppo record the peak of the update on the worst rank, other runs that of the whole run on the
    first rank. The run must have used GPUs: on a CPU the metric is the memory of the process.

    Args:
        run: directory of a finished run.
        cluster: device and assumptions; the number of ranks is that of the run.

    Raises:
        ConfigError: the run recorded no peaks, or did not use GPUs.
    """
    values, metrics = _read(run)
    layout = str(values.get("layout", ""))
    if "cuda" not in layout:
        raise ConfigError(
            f"--calibrate={run}: must be a run on GPUs; its layout is {layout or 'not known'}. "
            "Use another run."
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
            f"--calibrate={run}: must have recorded its memory; no line of metrics.jsonl has "
            f"{_PEAK}. Let it take a step."
        )
    return {str(key): value for key, value in values.items()}, metrics
