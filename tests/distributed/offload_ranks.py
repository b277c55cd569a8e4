"""A few PPO steps with and without offload: OUT CASES.

Writes for each case the highest memory of each phase, the median of the steps after the first two (until then
the heap grows), what was off the device in between, and a digest of every weight and moment at the end.
"""

import ctypes
import gc
import hashlib
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from marlhf_mega.config.schema import Config
from marlhf_mega.experience.builder import ExperienceBuilder
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.experience.segmentation import Segmenter
from marlhf_mega.metrics.memory import PHASE_PEAKS, PhasePeaks
from marlhf_mega.metrics.ppo import step_sums
from marlhf_mega.metrics.reduce import reduce_metrics
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.models.offload import TRAINING, create_offload
from marlhf_mega.models.roles import Roles
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import max_over_world, sum_over_world
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.rollout.assignment import local_indices
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.update import ppo as update
from tests.distributed.layouts_ranks import BATCH, EOS, model, texts

M_MMAP_THRESHOLD = -3
STEPS, STEADY = 4, 2


def build_roles(config, mesh, folder):
    learners = {
        "policy": TrainState(model(config, mesh, "language", 1), config.policy, total_steps=STEPS),
        "critic": TrainState(model(config, mesh, "scalar", 2), config.critic, total_steps=STEPS),
    }
    frozen = {
        "reference": model(config, mesh, "language", 3),
        "rewards": [model(config, mesh, "scalar", 4)],
    }
    for chunk in (*frozen["reference"], *frozen["rewards"][0]):
        chunk.requires_grad_(False).eval()
    offload = create_offload(config.memory, mesh.platform, folder, **learners, **frozen)
    return Roles(**learners, **frozen, offload=offload)


def take_step(config, roles, mesh, step, peaks):
    sums = step_sums(maximum=PHASE_PEAKS)
    policy = [ddp.module for ddp in roles.policy.chunks]
    scorer = Scorer(config.reward, roles.rewards, None, mesh)
    segmenter = Segmenter(config.macro, None, mesh, seed=0)
    maker = ExperienceBuilder(config, roles, scorer, segmenter, mesh)
    own = local_indices(BATCH, BATCH, mesh)
    prompts = texts(5, [3, 6, 4, 5, 3, 7, 4, 6])
    mesh.platform.empty_cache()
    with peaks("rollout"):
        rollout = Generator(policy, mesh, stop=StopRule(frozenset({EOS}))).generate(
            [prompts[i] for i in own],
            own,
            RolloutOptions(
                rule=SamplingRule(temperature=1.0),
                max_response_tokens=6,
                seed=11,
                step=step,
            ),
        )
    away = roles.offload.num_bytes
    mesh.platform.empty_cache()
    with peaks("experience"):
        experience, _ = maker.build(rollout, [{}] * len(own), step=step, kl_coef=0.05, sums=sums)
    mesh.platform.empty_cache()
    with peaks("update"), roles.offload.on_device(*TRAINING):
        update.ppo_update(
            roles, experience, config, mesh, step=step, sums=sums, timers=PhaseTimers()
        )
    peaks.drain(sums)
    metrics = reduce_metrics(sums, sum_over_world, max_over_world, device=mesh.device)
    return {"away": away} | {
        name.removeprefix("perf/").removesuffix("_peak_memory_gib"): metrics.get(name)
        for name in PHASE_PEAKS
    }


def digest(roles):
    found = hashlib.sha256()
    with roles.offload.on_device(*TRAINING):
        for state in (roles.policy, roles.critic):
            weights = [p for chunk in state.chunks for p in chunk.parameters()]
            for tensor in (*weights, *state.optimizer_tensors()):
                found.update(tensor.detach().view(torch.uint8).to("cpu", copy=True).numpy().data)
    return found.hexdigest()


def run_case(config, mesh, folder):
    roles = build_roles(config, mesh, folder)
    roles.offload.start()
    peaks = PhasePeaks(mesh.platform)
    steps = [take_step(config, roles, mesh, step, peaks) for step in range(STEPS)][STEADY:]
    found = {name: _median([step[name] for step in steps]) for name in steps[0]}
    digests = [None] * mesh.world_size
    dist.all_gather_object(digests, digest(roles))
    numbers = [
        sum(p.numel() for chunk in chunks for p in chunk.parameters())
        for chunks in (roles.policy.chunks, roles.critic.chunks)
    ]
    return found | {"digests": digests, "parameters": numbers}


def _median(values):
    return None if None in values else statistics.median(values)


def map_large_blocks():
    """Let glibc give every block of a megabyte back as soon as it is free: peaks are repeatable."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)


def main():
    map_large_blocks()
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = []
    for case in cases:
        config = Config.model_validate(case)
        mesh = create_mesh(config.parallel)
        results.append(run_case(config, mesh, out.parent))
        if mesh.rank == 0:
            out.write_text(json.dumps(results))
        destroy_mesh(leave_world=False)
        gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
