"""Seconds of scoring and update of one batch, cut to microbatches in several ways by turns.

    python tools/benchmark/microbatches.py --ranks 4 rows:4 tokens:1152 packed:1152 ...

`rows:N` cuts to N padded sequences, `tokens:N` to at most N tokens with padding, `packed:N` to at
most N tokens without. Responses are random tokens. Prints readable lines and one JSON object.
"""

import argparse
import sys
import time
from collections.abc import Callable

import common
import torch
from ppo_step import build_roles

from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience import builder
from marlhf_mega.experience.builder import ExperienceBuilder
from marlhf_mega.experience.scoring import Scorer
from marlhf_mega.experience.segmentation import Segmenter
from marlhf_mega.metrics.reduce import MetricSums
from marlhf_mega.metrics.timing import PhaseTimers
from marlhf_mega.models.roles import Roles
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.deal import balance
from marlhf_mega.rollout.types import Rollout
from marlhf_mega.update import ppo as update

WAYS = {
    "rows": lambda n: {"microbatch_size": n},
    "tokens": lambda n: {"microbatch_tokens": n},
    "packed": lambda n: {"microbatch_tokens": n, "packing": True},
}


class Way:
    """One way to cut, and the seconds that it took."""

    def __init__(
        self, name: str, args: argparse.Namespace, config: Config, mesh: Mesh, roles: Roles
    ) -> None:
        kind, _, size = name.partition(":")
        if kind not in WAYS or not size.isdecimal():
            raise ValueError(f"{name}: must be rows:N, tokens:N or packed:N.")
        ppo = WAYS[kind](int(size)) | {"minibatch_size": args.batch // args.minibatches}
        self.config = config.model_copy(update={"ppo": config.ppo.model_copy(update=ppo)})
        self.roles, self.mesh, self.seed = roles, mesh, args.seed
        self.rollout = random_rollout(args, self.config, mesh)
        self.seconds: dict[str, list[float]] = {}

    def run(self, step: int) -> None:
        """Score and update once, and note the slowest rank's seconds and all ranks' CPU seconds."""
        config, mesh = self.config, self.mesh
        sums = MetricSums(mean=[*builder.MEANS, *update.MEANS], maximum=builder.MAXIMA)
        limit = MicrobatchLimit.of(config.ppo)
        scorer = Scorer(config.reward.source, self.roles.rewards, None, mesh, limit=limit)
        segmenter = Segmenter(config.macro, None, mesh, seed=self.seed)
        maker = ExperienceBuilder(config, self.roles, scorer, segmenter, mesh)

        def score(_: int) -> None:
            rows = [{}] * len(self.rollout.prompts)
            made = maker.build(self.rollout, rows, step=step, kl_coef=0.05, sums=sums)
            self.experience, _ = made

        def learn(_: int) -> None:
            experience = self.experience
            timers = PhaseTimers()
            update.ppo_update(
                self.roles, experience, config, mesh, step=step, sums=sums, timers=timers
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
        """Return the spread of the counted seconds, and what one step runs over."""
        seconds = {name: common.spread(values[warmup:]) for name, values in self.seconds.items()}
        share = self.config.ppo.minibatch_size // self.mesh.dp_size
        tokens, most = 0.0, 0.0
        for rows in torch.arange(len(self.rollout.prompts)).split(share):
            cut = update.make_microbatches(self.experience, rows, self.config, self.mesh)
            tokens += common.slowest(self.mesh, sum(m.batch.tokens.numel() for m in cut))
            most += common.slowest(self.mesh, len(cut))
        # The fullest rank of a minibatch is the one that the others wait for.
        return seconds | {"tokens": int(tokens * self.mesh.dp_size), "microbatches": int(most)}


def random_rollout(args: argparse.Namespace, config: Config, mesh: Mesh) -> Rollout:
    """Return this rank's share of random prompts and responses, dealt as the ppo job does."""
    lengths = common.response_lengths(
        args.lengths, count=args.batch, fixed=args.response_len, seed=args.seed
    )
    texts = [
        common.random_tokens(seed, sizes, args.vocab)
        for seed, sizes in ((args.seed, [args.prompt_len] * args.batch), (args.seed + 1, lengths))
    ]
    size = config.ppo.minibatch_size
    own = update.local_indices(args.batch, size, mesh)
    rollout = Rollout(
        prompts=[texts[0][i] for i in own],
        responses=[texts[1][i] for i in own],
        finished=[True] * len(own),
        sample_indices=own,
        logprobs=torch.zeros(len(own), max(lengths[i] for i in own)),
    )
    if config.ppo.microbatch_tokens is None:
        return rollout
    return balance(rollout, minibatch_size=size, mesh=mesh)


def measure(args: argparse.Namespace, config: Config, mesh: Mesh) -> common.Result:
    """Run all ways by turns on the same models."""
    if args.batch % (args.minibatches * mesh.dp_size):
        raise ValueError(
            f"--minibatches={args.minibatches}: must cut --batch={args.batch} into equal parts "
            f"that {mesh.dp_size} data-parallel ranks can share. Change one of them."
        )
    roles = build_roles(config, mesh, seed=args.seed)
    ways = {name: Way(name, args, config, mesh, roles) for name in args.ways}
    for step in range(args.warmup + args.iters):
        for way in ways.values():
            way.run(step)
    found = {name: way.found(args.warmup) for name, way in ways.items()}
    lines = [f"{'':14}{'tokens':>8}{'microbatches':>14}{'scoring s':>11}{'update s':>10}  CPU s"]
    for name, way in found.items():
        wall, cpu = (
            [way[f"{phase}{kind}"]["median"] for phase in ("scoring", "update")]
            for kind in ("_s", "_cpu_s")
        )
        lines.append(
            f"{name:14}{way['tokens']:8}{way['microbatches']:14}{wall[0]:11.2f}{wall[1]:10.2f}"
            f"  {cpu[0]:.2f} + {cpu[1]:.2f}"
        )
    return {"seconds": {}, "flops": {}, "ways": found, "lines": lines}


def main() -> int:
    """Measure and print."""
    options = common.parser(__doc__.partition("\n")[0])
    options.add_argument("ways", nargs="+", help="rows:N, tokens:N or packed:N")
    options.add_argument("--minibatches", type=int, default=4, help="optimizer steps")
    options.add_argument("--lengths", help=common.LENGTHS_HELP)
    args = options.parse_args()
    return common.run(args, lambda config, mesh: measure(args, config, mesh))


if __name__ == "__main__":
    sys.exit(main())
