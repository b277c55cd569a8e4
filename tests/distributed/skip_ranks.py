"""Poison one replica's advantages and values for some PPO steps: OUT RUN_DIR PARALLEL."""

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from marlhf_mega.algorithm.macro_actions import MacroActions
from marlhf_mega.experience.builder import ExperienceBuilder
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.experience.segmentation import Segmenter
from marlhf_mega.metrics.ppo import step_sums
from marlhf_mega.metrics.reduce import reduce_metrics
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.models.roles import Roles
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import gather_objects, max_over_world, sum_over_world
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.rollout.assignment import local_indices
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.update import ppo as update
from tests.distributed.layouts_ranks import BATCH, EOS, config_for, model, texts


def hash_of(state):
    """Hash the weights of one rank."""
    total = hashlib.sha256()
    for chunk in state.chunks:
        for parameter in chunk.parameters():
            total.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def everywhere(value):
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def poisoned(config, roles, rollout, mesh):
    """Build the experience of a batch in which one log-prob is not a number."""
    ppo = config.ppo.model_copy(update={"old_logprobs": "sampler"})
    logprobs = rollout.logprobs.clone()
    if mesh.dp_rank == mesh.dp_size - 1:
        logprobs[0, 1] = float("nan")
    maker = ExperienceBuilder(
        config.model_copy(update={"ppo": ppo}),
        roles,
        Scorer(config.reward, roles.rewards, None, mesh),
        Segmenter(config.macro, None, mesh, seed=0),
        mesh,
    )
    sums = step_sums()
    experience, _ = maker.build(
        replace(rollout, logprobs=logprobs),
        [{}] * len(rollout.prompts),
        step=3,
        kl_coef=0.05,
        sums=sums,
    )
    counts = experience.actions.response_mask
    parts = gather_objects(
        {
            "advantages": experience.advantages[counts].tolist(),
            "counting": counts.any(1).tolist(),
            "finite": bool(experience.advantages.isfinite().all()),
        },
        mesh.groups.dp,
    )
    return {"parts": parts, "metrics": reduce_metrics(sums, sum_over_world, max_over_world)}


def empty(config, roles, experience, mesh, good):
    """Take a step, so that Adam remembers one, then another on samples of which none counts."""
    experience.advantages[0, 0] = good
    nothing = MacroActions.from_ids(torch.full_like(experience.actions.ids, -1))
    found = []
    for samples in (experience, replace(experience, actions=nothing)):
        before = everywhere([hash_of(roles.policy), hash_of(roles.critic)])
        sums = step_sums()
        update.ppo_update(roles, samples, config, mesh, step=9, sums=sums, timers=PhaseTimers())
        same = everywhere([hash_of(roles.policy), hash_of(roles.critic)]) == before
        found.append([same, reduce_metrics(sums, sum_over_world, max_over_world)])
    return found


def main():
    out, run_dir, parallel = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    config = config_for({"model": {}, "parallel": parallel, "microbatch": {"microbatch_size": 2}})
    run = config.run.model_copy(update={"dir": run_dir, "max_skipped_steps": 2})
    ppo = config.ppo.model_copy(update={"epochs": 1})
    config = config.model_copy(update={"run": run, "ppo": ppo})
    mesh = create_mesh(config.parallel)
    roles = Roles(
        policy=TrainState(model(config, mesh, "language", 1), config.policy, total_steps=9),
        critic=TrainState(model(config, mesh, "scalar", 2), config.critic, total_steps=9),
        reference=model(config, mesh, "language", 3),
        rewards=[model(config, mesh, "scalar", 4)],
    )
    own = local_indices(BATCH, BATCH, mesh)
    prompts = texts(5, [3, 6, 4, 5, 3, 7, 4, 6])
    chunks = [ddp.module for ddp in roles.policy.chunks]
    rollout = Generator(chunks, mesh, stop=StopRule(frozenset({EOS}))).generate(
        [prompts[i] for i in own],
        own,
        RolloutOptions(
            rule=SamplingRule(temperature=1.0),
            max_response_tokens=10,
            seed=11,
            step=3,
        ),
    )
    scorer = Scorer(config.reward, roles.rewards, None, mesh)
    segmenter = Segmenter(config.macro, None, mesh, seed=0)
    maker = ExperienceBuilder(config, roles, scorer, segmenter, mesh)
    built = step_sums()
    experience, _ = maker.build(rollout, [{}] * len(own), step=3, kl_coef=0.05, sums=built)
    good = experience.advantages[0, 0].item()
    steps, error = [], None
    # Two bad steps, a good one, then as many as it takes.
    for step, bad in enumerate([True, True, False, True, True, True]):
        if mesh.dp_rank == mesh.dp_size - 1:
            experience.advantages[0, 0] = float("nan") if bad else good
        before = everywhere([hash_of(roles.policy), hash_of(roles.critic)])
        sums = step_sums()
        try:
            update.ppo_update(
                roles, experience, config, mesh, step=step, sums=sums, timers=PhaseTimers()
            )
        except RuntimeError as problem:
            error = str(problem)
        after = everywhere([hash_of(roles.policy), hash_of(roles.critic)])
        pairs = list(zip(before, after, strict=True))
        steps.append(
            {
                "policy_same": [one[0] == other[0] for one, other in pairs],
                "critic_same": [one[1] == other[1] for one, other in pairs],
                "metrics": reduce_metrics(sums, sum_over_world, max_over_world),
                "errors": everywhere(error),
            }
        )
    found = {
        "steps": steps,
        "poisoned": poisoned(config, roles, rollout, mesh),
        "empty": empty(config, roles, experience, mesh, good),
    }
    if mesh.rank == 0:
        out.write_text(json.dumps(found))
    destroy_mesh()


if __name__ == "__main__":
    main()
