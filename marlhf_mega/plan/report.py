"""A plan as text and as JSON."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from marlhf_mega.config.limits import GIB
from marlhf_mega.plan.activations import logits_bytes
from marlhf_mega.plan.generation import Generation, replay_mask_bytes, routing_bytes
from marlhf_mega.plan.memory import StageMemory
from marlhf_mega.plan.parameters import whole_model_size
from marlhf_mega.plan.plan import Plan
from marlhf_mega.plan.timing import GENERATION_PARTS, MOVE, training_seconds

_WHEN = {
    "another try": "at most, up to rollout.filter_tries={config.rollout.filter_tries} in all",
    "reference": "for the pairs of each step of an epoch, all before the first step",
}


def as_text(plan: Plan, change: tuple[Mapping[str, Any], Plan] | None) -> str:
    """Format a plan for a terminal.

    Args:
        plan: of a job.
        change: from `smallest_change`, if the job does not fit.
    """
    lines = [*_head(plan), "", *_roles(plan), "", *_phases(plan), "", *_times(plan), ""]
    return "\n".join([*lines, *_checkpoints(plan), _host(plan), "", verdict(plan, change)]) + "\n"


def verdict(plan: Plan, change: tuple[Mapping[str, Any], Plan] | None) -> str:
    """Say in one line whether the job fits, and what to change if not."""
    where = plan.worst.where
    size = f"{plan.cluster.usable / GIB:.1f} GiB of {plan.cluster.gpu.name}"
    if plan.fits:
        return f"fits: {plan.spare / GIB:.1f} GiB to spare of {size} ({where})"
    over = f"does not fit: {-plan.spare / GIB:.1f} GiB over {size} ({where})"
    if change is None:
        return f"{over}; no change of settings makes it fit. Use more machines."
    keys = " ".join(f"{key}={_as_override(value)}" for key, value in change[0].items())
    return f"{over}; with {keys} it fits, {change[1].spare / GIB:.1f} GiB to spare"


def as_json(plan: Plan, change: tuple[Mapping[str, Any], Plan] | None) -> dict[str, Any]:
    """Return the whole plan, with sizes in bytes and times in seconds."""
    work, cluster = plan.work, plan.cluster
    return {
        "job": work.job,
        "gpu": asdict(cluster.gpu),
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "layout": asdict(work.layout),
        "rollout_ranks": work.num_rollout_ranks,
        "rollout_layout": asdict(Generation.of_rollout(work).layout) if work.job == "ppo" else None,
        "usable_bytes": cluster.usable,
        "peak_bytes": plan.worst.peak,
        "spare_bytes": plan.spare,
        "fits": plan.fits,
        "verdict": verdict(plan, change),
        "change": None if change is None else dict(change[0]),
        "roles": {
            role.name: {
                "parameters": whole_model_size(role.model, role.head),
                "assumed_shape": role.is_assumed,
            }
            for role in work.roles
        },
        "microbatch": asdict(work.microbatch),
        "scoring_microbatch": asdict(work.scoring),
        "num_microbatches": work.num_microbatches,
        "stages": [_stage_as_json(stage) for stage in plan.stages],
        "rollout_stages": [_stage_as_json(stage) for stage in plan.rollout_stages],
        "step_seconds": dict(plan.seconds),
        "besides_seconds": dict(plan.besides),
        "whole_step_seconds": plan.step_seconds,
        "pipeline_bubble": plan.bubble,
        "checkpoint": asdict(plan.checkpoints)
        | {"failures_per_week": plan.checkpoints.failures_per_week},
        "host_memory": asdict(plan.host) | {"total": plan.host.total},
        "assumptions": asdict(cluster.rates)
        | asdict(cluster.reliability)
        | {
            "has_engine": cluster.has_engine,
            "reserved_bytes": cluster.reserved,
            "fragmentation": cluster.fragmentation,
            "activation_factor": cluster.activation_factor,
        },
    }


def _stage_as_json(stage: StageMemory) -> dict[str, Any]:
    return {
        "stage": stage.stage,
        "roles": {name: asdict(role) for name, role in stage.roles.items()},
        "phases": {name: dict(held) for name, held in stage.phases.items()},
        "phase_bytes": {name: stage.total(name) for name in stage.phases},
    }


def _head(plan: Plan) -> list[str]:
    work, cluster = plan.work, plan.cluster
    microbatch, tensor = work.microbatch, work.layout.tensor
    trains = f"{work.layout.world} ranks train at " if work.num_rollout_ranks else ""
    dtype = "float32" if plan.formats.element == 4 else "bfloat16"
    lines = [
        f"{work.job} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}: "
        f"{trains}{work.layout.describe()}, {dtype}"
        + (f" + FP8 {work.config.precision.fp8_recipe}" if plan.formats.fp8 else ""),
        f"microbatch {microbatch.describe()} tokens, {work.num_microbatches} per optimizer step, "
        f"pipeline idle {plan.bubble:.0%}",
    ]
    if work.policy.head == "language":
        token = logits_bytes(
            work.policy.model, work.layout, filtered=work.config.rollout.is_filtered
        )
        lines.append(f"log-probs: {token / 2**20:.2f} MiB for the logits of a token on a rank")
    if work.job == "ppo":
        if work.scoring.tokens > microbatch.tokens:
            lines.append(f"scoring microbatch {work.scoring.describe()} tokens")
        generation, num_rollout_ranks = Generation.of_rollout(work), work.num_rollout_ranks
        tensor = max(tensor, generation.layout.tensor)
        where = f"{num_rollout_ranks} ranks only generate," if num_rollout_ranks else "rollout"
        lines.append(
            f"{where} at {generation.layout.describe()}: {generation.slots} sequences at "
            "a time on each replica"
        )
        if masks := replay_mask_bytes(work):
            lines.append(f"masks of top-k and top-p: {masks / GIB:.2f} GiB of host memory a rank")
        if routing := routing_bytes(work):
            lines.append(f"routing of the rollout: {routing / GIB:.2f} GiB of host memory a rank")
    if tensor > cluster.gpus_per_node:
        lines.append("tensor parallelism spans several machines: far slower than estimated")
    assumed = [role.name for role in work.roles if role.is_assumed]
    if assumed:
        lines.append(f"assumed to have the policy's shape: {', '.join(assumed)}")
    return lines


def _roles(plan: Plan) -> list[str]:
    lines: list[str] = []
    for stage in _worst_of_each_kind(plan):
        kind = "rollout rank" if stage.only_generates else "rank"
        worst = ", the worst" if stage is plan.worst else ""
        lines += [""] if lines else []
        lines += [
            f"GiB on a {kind} of stage {stage.stage}{worst}",
            f"{'':<12}{'parameters':>16}{'weights':>10}{'gradients':>10}{'optimizer':>10}{'sum':>10}",
        ]
        for name, role in stage.roles.items():
            sizes = (role.weights + role.fp8_copies, role.gradients, role.optimizer, role.total)
            shown = "".join(f"{size / GIB:>10.2f}" for size in sizes)
            lines.append(f"{name:<12}{role.num_parameters:>16,}{shown}")
    return lines


def _phases(plan: Plan) -> list[str]:
    lines = []
    for stage in _worst_of_each_kind(plan):
        for phase, held in stage.phases.items():
            rest = {
                name: size
                for name, size in held.items()
                if not name.endswith((" weights", " gradients", " optimizer"))
            }
            models = sum(held.values()) - sum(rest.values())
            parts = [f"models {models / GIB:.2f}"]
            parts += [f"{name} {size / GIB:.2f}" for name, size in rest.items()]
            name = "rollout rank" if stage.only_generates else phase
            lines.append(f"{name:<12}{stage.total(phase) / GIB:>8.2f} GiB: {', '.join(parts)}")
    return lines


def _worst_of_each_kind(plan: Plan) -> list[StageMemory]:
    """Return the worst stage of the ranks that train and of those that only generate."""
    kinds = [stages for stages in (plan.stages, plan.rollout_stages) if stages]
    return [max(stages, key=lambda stage: stage.peak) for stages in kinds]


def _times(plan: Plan) -> list[str]:
    lines = [f"step {plan.step_seconds:.1f} s at full length, by the stated efficiencies"]
    if plan.work.num_rollout_ranks:
        lines.append(_sides(plan))
    for phase in ("rollout", "experience", "update", "gradients"):
        parts = {n: s for n, s in plan.seconds.items() if n.partition(" ")[0] == phase}
        if parts:
            shown = ", ".join(f"{n.partition(' ')[2]} {s:.1f}" for n, s in parts.items())
            lines.append(f"{phase:<12}{sum(parts.values()):>8.1f} s: {shown}")
    for part, size in plan.besides.items():
        lines.append(f"{part:<12}{size:>8.1f} s: {_WHEN[part].format(config=plan.work.config)}")
    return lines


def _sides(plan: Plan) -> str:
    """Describe the step of both kinds of ranks, and whether they overlap."""
    work, seconds = plan.work, plan.seconds
    generating = sum(seconds[part] for part in GENERATION_PARTS)
    training = training_seconds(seconds)
    order = "while" if work.config.rollout.staleness else "then"
    return (
        f"resharding {seconds[MOVE]:.1f} s; {work.num_rollout_ranks} ranks generate for "
        f"{generating:.1f} s, {order} {work.layout.world} train for {training:.1f} s"
    )


def _checkpoints(plan: Plan) -> list[str]:
    save = plan.checkpoints
    grace = math.ceil(plan.step_seconds + save.write_seconds)
    return [
        f"checkpoint {save.num_bytes / GIB:.1f} GiB, written in {save.write_seconds:.0f} s; "
        f"{save.failures_per_week:.2g} failures a week",
        f"best save interval {save.interval_seconds / 60:.0f} minutes "
        f"(checkpoint.interval={save.interval_steps}); {save.lost_fraction:.1%} of time lost",
        f"a run that is asked to stop needs {grace} s: a step and a save (sbatch "
        f"--signal=B:USR1@{grace}, terminationGracePeriodSeconds)",
    ]


def _host(plan: Plan) -> str:
    host = plan.host
    data = "unknown, without the file" if host.data is None else f"{host.data / GIB:.1f}"
    return (
        f"host memory of a machine, GiB: save {host.save / GIB:.1f}, load {host.load / GIB:.1f}, "
        f"export {host.export / GIB:.1f}, offload {host.offload / GIB:.1f}, data {data}"
    )


def _as_override(value: Any) -> str:
    return json.dumps(value).strip('"')
