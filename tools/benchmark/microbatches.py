"""Time scoring and update of one batch for several ways to form microbatches, which alternate.

    python tools/benchmark/microbatches.py --ranks 4 sequences:4 tokens:1152 packed:1152

A microbatch of `sequences:N` has N padded sequences, one of `tokens:N` at most N tokens with
padding, one of `packed:N` at most N tokens without padding. Responses are random tokens. Prints
readable lines and one JSON object.
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import common
import torch
from ppo_step import build_roles, experience_builder

from marlhf_mega.config.schema import Config
from marlhf_mega.metrics.ppo import step_sums
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.models.roles import Roles
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.assignment import balance, local_indices
from marlhf_mega.rollout.types import Rollout
from marlhf_mega.update import ppo as update

WAYS = {
    "sequences": lambda n: {"microbatch_size": n},
    "tokens": lambda n: {"microbatch_tokens": n},
    "packed": lambda n: {"microbatch_tokens": n, "packing": True},
}


class Way:
    """One way to form microbatches, and the seconds that it took."""

    def __init__(
        self, name: str, args: argparse.Namespace, config: Config, mesh: Mesh, roles: Roles
    ) -> None:
        kind, _, size = name.partition(":")
        if kind not in WAYS or not size.isdecimal():
            raise ValueError(f"{name}: must be sequences:N, tokens:N or packed:N.")
        ppo = WAYS[kind](int(size)) | {"minibatch_size": args.batch // args.minibatches}
        self.config = config.model_copy(update={"ppo": config.ppo.model_copy(update=ppo)})
        self.roles, self.mesh, self.seed = roles, mesh, args.seed
        self.rollout = random_rollout(args, self.config, mesh)
        self.seconds: dict[str, list[float]] = {}

    def run(self, step: int) -> None:
        """Score and update once; record the slowest rank's seconds and all ranks' CPU seconds."""
        config, mesh = self.config, self.mesh
        sums = step_sums()
        builder = experience_builder(config, self.roles, mesh, seed=self.seed)

        def score(_: int) -> None:
            rows: list[dict[str, Any]] = [{}] * len(self.rollout.prompts)
            built = builder.build(self.rollout, rows, step=step, kl_coef=0.05, sums=sums)
            self.experience = built[0]

        def learn(_: int) -> None:
            update.ppo_update(
                self.roles,
                self.experience,
                config,
                mesh,
                step=step,
                sums=sums,
                timers=PhaseTimers(),
            )

        self._time("scoring", score)
        self._time("update", learn)

    def _time(self, phase: str, work: Callable[[int], None]) -> None:
        before = time.process_time()
        wall = common.timed(self.mesh, work, warmup=0, iters=1)
        cpu = common.total(self.mesh, time.process_time() - before)
        for name, value in ((f"{phase}_s", wall[0]), (f"{phase}_cpu_s", cpu)):
            self.seconds.setdefault(name, []).append(value)

    def found(self, warmup: int) -> common.Result:
        """Return the spread of the timed seconds, and one step's tokens and microbatches."""
        seconds = {name: common.spread(values[warmup:]) for name, values in self.seconds.items()}
        share = self.config.ppo.minibatch_size // self.mesh.dp_size
        tokens, most = 0.0, 0.0
        for own in torch.arange(len(self.rollout.prompts)).split(share):
            parts = update.make_microbatches(self.experience, own, self.config, self.mesh)
            tokens += common.slowest(self.mesh, sum(part.batch.tokens.numel() for part in parts))
            most += common.slowest(self.mesh, len(parts))
        # All ranks wait for the one with the most tokens in a minibatch.
        return seconds | {"tokens": int(tokens * self.mesh.dp_size), "microbatches": int(most)}


def random_rollout(args: argparse.Namespace, config: Config, mesh: Mesh) -> Rollout:
    """Return this rank's share of random prompts and responses, assigned as in the ppo job."""
    lengths = common.response_lengths(
        args.lengths, count=args.batch, fixed=args.response_len, seed=args.seed
    )
    prompts = common.random_tokens(args.seed, [args.prompt_len] * args.batch, args.vocab)
    responses = common.random_tokens(args.seed + 1, lengths, args.vocab)
    size = config.ppo.minibatch_size
    own = local_indices(args.batch, size, mesh)
    rollout = Rollout(
        prompts=[prompts[i] for i in own],
        responses=[responses[i] for i in own],
        finished=[True] * len(own),
        sample_indices=own,
        logprobs=torch.zeros(len(own), max(lengths[i] for i in own)),
    )
    if config.ppo.microbatch_tokens is None:
        return rollout
    return balance(rollout, minibatch_size=size, mesh=mesh)


def measure(args: argparse.Namespace, config: Config, mesh: Mesh) -> common.Result:
    """Alternate all ways on the same models."""
    if args.batch % (args.minibatches * mesh.dp_size):
        raise ValueError(
            f"--minibatches={args.minibatches}: must split --batch={args.batch} into equal parts "
            f"that {mesh.dp_size} data-parallel ranks can share. Change one of them."
        )
    roles = build_roles(config, mesh, seed=args.seed)
    ways = {name: Way(name, args, config, mesh, roles) for name in args.ways}
    for step in range(args.warmup + args.iters):
        for way in ways.values():
            way.run(step)
    found = {name: way.found(args.warmup) for name, way in ways.items()}
    lines = [f"{'':14}{'tokens':>8}{'microbatches':>14}{'scoring s':>11}{'update s':>10}  CPU s"]
    for name, result in found.items():
        wall, cpu = (
            [result[f"{phase}{kind}"]["median"] for phase in ("scoring", "update")]
            for kind in ("_s", "_cpu_s")
        )
        lines.append(
            f"{name:14}{result['tokens']:8}{result['microbatches']:14}{wall[0]:11.2f}{wall[1]:10.2f}"
            f"  {cpu[0]:.2f} + {cpu[1]:.2f}"
        )
    return {"seconds": {}, "flops": {}, "ways": found, "lines": lines}


def main() -> int:
    """Measure and print."""
    options = common.parser(__doc__)
    options.add_argument("ways", nargs="+", help="sequences:N, tokens:N or packed:N")
    options.add_argument("--minibatches", type=int, default=4, help="optimizer steps per update")
    options.add_argument("--lengths", help=common.LENGTHS_HELP)
    return common.run(options.parse_args(), measure)


if __name__ == "__main__":
    sys.exit(main())
