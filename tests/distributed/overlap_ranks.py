"""The same PPO steps with and without overlap, layout after layout: OUT CASES."""

import gc
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from marlhf_mega.checkpoint import saver, store
from marlhf_mega.experience.builder import ExperienceBuilder
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.experience.segmentation import Segmenter
from marlhf_mega.metrics.ppo import step_sums
from marlhf_mega.metrics.reduce import reduce_metrics
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.models.forward import logprob_forward
from marlhf_mega.models.roles import Roles
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import max_over_world, sum_over_world
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.parallel.schedule import pipeline_forward_backward
from marlhf_mega.rollout.assignment import local_indices
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.update import ppo as update
from marlhf_mega.update.fp8_guard import compare
from tests.distributed.layouts_ranks import BATCH, EOS, config_for, model, texts

# So small that every layer's matrices fill buckets of their own.
BUCKET_SIZE = 3000


class Run:
    """Roles, and the modules behind them as whoever built them holds them."""

    def __init__(self, config, mesh, *, overlap):
        options = {"total_steps": 99, "overlap": overlap}
        options |= {"bucket_size": BUCKET_SIZE} if overlap else {}
        self.config, self.mesh, self.sent = config, mesh, []
        self.held = {
            "policy": model(config, mesh, "language", 1),
            "critic": model(config, mesh, "scalar", 2),
        }
        self.roles = Roles(
            policy=TrainState(self.held["policy"], config.policy, **options),
            critic=TrainState(self.held["critic"], config.critic, **options),
            reference=model(config, mesh, "language", 3),
            rewards=[model(config, mesh, "scalar", 4)],
        )
        for state in (self.roles.policy, self.roles.critic):
            self.watch(state.chunks[0].config)

    def watch(self, settings):
        """Note which reductions are under way when the last backward pass is over."""
        finalize = settings.finalize_model_grads_func

        def watched(chunks, *args, **kwargs):
            groups = [g for c in chunks for g in groups_of(c)]
            self.sent.append([g.grad_reduce_handle is not None for g in groups])
            finalize(chunks, *args, **kwargs)

        settings.finalize_model_grads_func = watched

    def experience(self):
        config, mesh = self.config, self.mesh
        own = local_indices(BATCH, BATCH, mesh)
        prompts = texts(5, [3, 6, 4, 5, 3, 7, 4, 6])
        rollout = Generator(self.held["policy"], mesh, stop=StopRule(frozenset({EOS}))).generate(
            [prompts[i] for i in own],
            own,
            RolloutOptions(
                rule=SamplingRule(temperature=1.0),
                max_response_tokens=10,
                seed=11,
                step=3,
            ),
        )
        scorer = Scorer(config.reward, self.roles.rewards, None, mesh)
        segmenter = Segmenter(config.macro, None, mesh, seed=0)
        maker = ExperienceBuilder(config, self.roles, scorer, segmenter, mesh)
        sums = step_sums()
        return maker.build(rollout, [{}] * len(own), step=3, kl_coef=0.05, sums=sums)[0]

    def update(self, experience, step):
        sums = step_sums()
        update.ppo_update(
            self.roles,
            experience,
            self.config,
            self.mesh,
            step=step,
            sums=sums,
            timers=PhaseTimers(),
        )
        return reduce_metrics(sums, sum_over_world, max_over_world)

    def compare(self, experience):
        """Passes without a step, as the comparison of number formats takes them."""
        microbatches = update.make_microbatches(
            experience, torch.arange(len(experience.prompts)), self.config, self.mesh
        )
        objective = partial(update.policy_objective, config=self.config)
        options = {"forward": logprob_forward, "other": nullcontext}
        found = compare(self.roles.policy, microbatches[:2], objective, **options)
        return found.gradient_cosine

    def learners(self):
        return {"policy": self.roles.policy, "critic": self.roles.critic}


def gap(one, other):
    """Largest difference of any weight that the two runs hold on this rank."""
    pairs = [
        (left, right)
        for role in one.held
        for chunks in zip(one.held[role], other.held[role], strict=True)
        for left, right in zip(*(chunk.parameters() for chunk in chunks), strict=True)
    ]
    return max((left - right).abs().max().item() for left, right in pairs)


def groups_of(chunk):
    return (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)


def on_their_way(run, experience):
    """Take a step of the critic alone; say which gathers are under way then, and later."""
    chunks, critic = run.roles.critic.chunks, run.roles.critic
    microbatches = update.make_microbatches(
        experience, torch.arange(len(experience.prompts)), run.config, run.mesh
    )
    learner = update.critic_learner(run.roles.critic, run.config)
    critic.zero_grad()
    pipeline_forward_backward(chunks, microbatches, learner.forward, learner.objective)
    critic.step()

    def handles():
        return [g.param_gather_handle is not None for c in chunks for g in groups_of(c)]

    before, _ = handles(), critic.chunks
    return [before, handles()]


def crossed(config, mesh, folder, experience):
    """Go on without overlap from what was written with it, and the other way round."""
    runs = [Run(config, mesh, overlap=overlap) for overlap in (False, True)]
    for run, name in zip(runs, ("overlapped", "plain"), strict=True):
        store.load(store.find(folder / name, mesh), run.learners(), mesh)
    found = [gap(*runs)]
    for run in runs:
        run.update(experience, 9)
    return [*found, gap(*runs)]


def run_case(config, mesh, run_dir, previous):
    runs = plain, overlapped = [Run(config, mesh, overlap=overlap) for overlap in (False, True)]
    experience = plain.experience()
    metrics, gaps, good = [], [], experience.advantages[0, 0].item()
    for step in range(4):
        if mesh.dp_rank == mesh.dp_size - 1:
            experience.advantages[0, 0] = float("nan") if step == 1 else good
        metrics.append([run.update(experience, step) for run in runs])
        gaps.append(gap(*runs))
        if step == 2:
            cosines = [run.compare(experience) for run in runs]
    _, gathers = (on_their_way(run, experience) for run in runs)
    for run, name in zip(runs, ("plain", "overlapped"), strict=True):
        saver.save(run_dir / name, 1, run.learners(), {}, mesh, keep=1)
    result = {
        "metrics": metrics,
        "gaps": gaps,
        "cosines": cosines,
        "sent": overlapped.sent,
        "gathers": gathers,
        # What this layout wrote and, where there is one, another.
        "resumed": [
            crossed(config, mesh, folder, experience) for folder in (run_dir, previous) if folder
        ],
    }
    everyone = [None] * mesh.world_size
    dist.all_gather_object(everyone, result)
    return everyone


def main():
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    results, written = [], {}
    for number, case in enumerate(cases):
        config = config_for(case)
        changed = {
            role: getattr(config, role).model_copy(update={"grad_clip": case["grad_clip"]})
            for role in ("policy", "critic")
        }
        changed["ppo"] = config.ppo.model_copy(update={"epochs": 1})
        changed["run"] = config.run.model_copy(update={"dir": out.parent})
        config = config.model_copy(update=changed)
        mesh = create_mesh(config.parallel)
        run_dir = out.parent / str(number)
        name = str(case["model"])
        results.append(run_case(config, mesh, run_dir, written.get(name)))
        written[name] = run_dir
        if mesh.rank == 0:
            out.write_text(json.dumps(results))
        destroy_mesh(leave_world=False)
        gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
