"""Finds a change that makes a job fit."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from marlhf_mega.config.load import ConfigError, with_keys
from marlhf_mega.plan.generation import Generation
from marlhf_mega.plan.layout import WorldLayout
from marlhf_mega.plan.plan import Plan, make_plan
from marlhf_mega.plan.workload import microbatch_keys

Overrides = dict[str, Any]
"""Dotted keys and their new values."""


def smallest_change(plan: Plan) -> tuple[Overrides, Plan] | None:
    """Return the cheapest change after which the job fits, and the new plan; None without one."""
    for keys in _changes(plan):
        try:
            config = with_keys(plan.work.config, keys)
            changed = make_plan(config, plan.work.job, plan.cluster)
        except ConfigError:
            continue
        if changed.fits:
            return keys, changed
    return None


def _changes(plan: Plan) -> Iterator[Overrides]:
    """Yield changes that need no other machines: one key, then several, then another layout."""
    singles = _of_those_in_need(_settings(plan), plan)
    yield from singles
    everything: Overrides = {}
    for change in singles:
        everything |= change
        yield dict(everything)
    for change in _layouts(plan):
        yield change
        yield everything | change


def _settings(plan: Plan) -> list[Overrides]:
    config, layout = plan.work.config, plan.work.layout
    singles: list[Overrides] = []
    if layout.tensor > 1 and not layout.sequence_parallel:
        singles.append({"parallel.sequence_parallel": True})
    if config.memory.recompute == "none" and config.model.attention_softcap is not None:
        singles.append({"memory.recompute": "selective"})
    factor = config.ppo.scoring_microbatch_factor if plan.work.job == "ppo" else 1
    while factor > 1:
        factor //= 2
        singles.append({"ppo.scoring_microbatch_factor": factor})
    size = plan.work.microbatch.sequences
    while size > 1:
        size //= 2
        seq = plan.work.microbatch.seq
        singles.append(microbatch_keys(config, plan.work.job, sequences=size, seq=seq))
    if plan.work.job == "ppo":
        slots = Generation.of_rollout(plan.work).slots
        while slots > 8:
            slots //= 2
            singles.append({"rollout.slots": slots})
    if plan.work.job == "ppo" and not config.precision.fp8_param_gather:
        offload = ("offload_idle", "offload_optimizer")
        singles += [{f"memory.{k}": True} for k in offload if not getattr(config.memory, k)]
    if config.memory.recompute != "full":
        singles.append({"memory.recompute": "full", "memory.recompute_num_layers": None})
    return singles


def _layouts(plan: Plan) -> Iterator[Overrides]:
    """Yield larger layouts of the ranks that train, of those that only generate, of both."""
    most = plan.cluster.gpus_per_node
    training: list[Overrides] = [
        {
            "parallel.tensor_size": tensor,
            "parallel.pipeline_size": pipeline,
            "parallel.sequence_parallel": tensor > 1,
        }
        for tensor, pipeline in _larger(plan.work.layout, most)
    ]
    generating: list[Overrides] = [
        {"rollout.tensor_size": tensor, "rollout.pipeline_size": pipeline}
        for tensor, pipeline in _larger(Generation.of_rollout(plan.work).layout, most)
        if plan.rollout_stages
    ]
    training = _of_those_in_need(training, plan)
    generating = _of_those_in_need(generating, plan)
    yield from (*training, *generating)
    yield from (first | second for first, second in product(training, generating))


def _of_those_in_need(changes: list[Overrides], plan: Plan) -> list[Overrides]:
    """Remove changes for ranks that fit, where there are two kinds of ranks."""
    if not plan.rollout_stages:
        return changes
    found = []
    for change in changes:
        generates = all(key.startswith("rollout.") for key in change)
        stages = plan.rollout_stages if generates else plan.stages
        if max(stage.peak for stage in stages) > plan.cluster.usable:
            found.append(change)
    return found


def _larger(layout: WorldLayout, most_tensor: int) -> list[tuple[int, int]]:
    """Tensor and pipeline sizes that split the model into more parts, fewest first."""
    found = [
        (tensor, pipeline)
        for tensor in (1, 2, 4, 8)
        for pipeline in (1, 2, 4, 8, 16)
        if tensor <= most_tensor
        and layout.tensor * layout.pipeline < tensor * pipeline
        and layout.world % (tensor * pipeline * layout.context) == 0
    ]
    return sorted(found, key=lambda pair: (pair[0] * pair[1], pair[1]))
