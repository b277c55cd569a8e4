"""Steps of ppo with filters, and what each of them trained on: OUT CASES."""

import functools
import json
import operator
import sys
from pathlib import Path

from marlhf_mega.config.schema import Config
from marlhf_mega.parallel.collectives import gather_objects
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.train.filtering import RolloutFilter
from marlhf_mega.train.inputs import read_inputs
from marlhf_mega.train.ppo import run_ppo
from marlhf_mega.train.rollouts import Rollouts

steps = []


def record(method, mesh):
    """Note what all replicas together get from a method that returns samples."""

    def recording(self, *arguments, **options):
        found = method(self, *arguments, **options)
        prompts, rollout, *scores = found
        scores = scores[0].scores.tolist() if scores else [None] * len(prompts)
        samples = zip(
            rollout.sample_indices,
            [p.prompt for p in prompts],
            rollout.responses,
            scores,
            strict=True,
        )
        parts = gather_objects(list(samples), mesh.groups.dp)
        steps[-1].setdefault(method.__name__, []).append(
            sorted(functools.reduce(operator.iadd, parts, []))
        )
        return found

    return recording


def main():
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    config = Config.model_validate(cases[0])
    mesh = create_mesh(config.parallel, num_rollout_ranks=config.rollout.ranks)
    for owner, name in ((Rollouts, "next"), (Rollouts, "more"), (RolloutFilter, "choose")):
        setattr(owner, name, record(getattr(owner, name), mesh))
    for case in cases:
        inputs = read_inputs(Config.model_validate(case), "ppo", mesh.launch.size)
        steps.append({})
        with Watchdog(inputs.config, mesh) as watchdog:
            run_ppo(inputs, mesh, watchdog)
    if mesh.launch.rank == 0:
        out.write_text(json.dumps(steps))
    destroy_mesh()


if __name__ == "__main__":
    main()
