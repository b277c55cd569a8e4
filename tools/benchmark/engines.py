"""Our decoder where the weights are trained, at a layout of its own, and vLLM, in one process.

    python tools/benchmark/engines.py --ranks 2 --tensor-size 2

All three generate the same number of tokens from the same weights, in turn, so that other work on
the machine slows them alike. Weights are fetched before each time, but by the first, which has
them. Without vLLM only the first two run. Prints readable lines and one JSON object.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import common

from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.platform import vllm
from marlhf_mega.rollout.assignment import local_indices
from marlhf_mega.rollout.protocol import ResponseGenerator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.rollout.vllm_process import import_vllm
from marlhf_mega.train.generation import build_generator

WAYS: dict[str, dict[str, object]] = {
    "own": {},
    "resharded": {"tensor_size": 1, "pipeline_size": 1},
    "vllm": {"engine": "vllm", "tensor_size": 1},
}


class Way:
    """One of the ways to generate, started, and what starting it took."""

    def __init__(
        self, name: str, policy: list[StageModel], config: Config, mesh: Mesh, *, eager: bool
    ) -> None:
        """Start it.

        Args:
            name: of `WAYS`.
            policy: this rank's chunks of the weights.
            config: of the benchmark.
            mesh: this rank's mesh.
            eager: let vLLM compile nothing.
        """
        changes = dict(WAYS[name])
        if name == "vllm":
            changes["vllm"] = config.rollout.vllm.model_copy(update={"enforce_eager": eager})
        rollout = config.rollout.model_copy(update=changes)
        config = config.model_copy(update={"rollout": rollout})
        mesh.platform.reset_memory_peak()
        before, start = mesh.platform.memory_allocated(), time.perf_counter()
        self.import_seconds = 0.0
        if name == "vllm":
            import_vllm().LLM  # noqa: B018  imported when it is asked for
            self.import_seconds = common.slowest(mesh, time.perf_counter() - start)
        self.generator: ResponseGenerator
        self.generator, self.moves = build_generator(policy, config, mesh, stop=StopRule())
        seconds = time.perf_counter() - start
        self.start_seconds = common.slowest(mesh, seconds) - self.import_seconds
        self._before, self._mesh = before, mesh

    def peak(self) -> float:
        """Return the most bytes that a rank has held since the start, besides those before it."""
        return common.slowest(self._mesh, self._mesh.platform.memory_peak() - self._before)


def measure(args: argparse.Namespace, config: Config, mesh: Mesh) -> common.Result:
    """Start the ways one after another, then let them generate in turn."""
    policy = common.build(config, mesh, "language", seed=args.seed)
    own = local_indices(args.batch, args.batch, mesh)
    every = common.random_tokens(
        args.seed, [args.prompt_len] * args.batch, config.model.vocab_size or 0
    )
    prompts = [every[i] for i in own]

    def work(way: Way) -> Callable[[int], None]:
        def generate(step: int) -> None:
            rule = SamplingRule(temperature=1.0)
            options = RolloutOptions(
                rule=rule, max_response_tokens=args.response_len, seed=args.seed, step=step
            )
            found = way.generator.generate(prompts, own, options)
            assert {len(r) for r in found.responses} == {args.response_len}

        return generate

    names = [name for name in WAYS if name != "vllm" or vllm.support()]
    ways, result = {}, {}
    for name in names:
        way = ways[name] = Way(name, policy, config, mesh, eager=args.eager)
        first = common.timed(mesh, work(way), warmup=0, iters=1)[0]
        result[name] = {
            "import_s": way.import_seconds,
            "start_s": way.start_seconds,
            "first_s": first,
            "memory_bytes": way.peak(),
        }
    seconds: dict[str, list[float]] = {name: [] for name in names}
    loads: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.iters):
        for name, way in ways.items():
            seconds[name] += common.timed(mesh, work(way), warmup=0, iters=1)
            loads[name].append(common.slowest(mesh, way.moves.seconds if way.moves else 0.0))
    lines = []
    for name, found in result.items():
        tokens = args.batch * args.response_len
        found["load_s"] = statistics.median(loads[name])
        found["tokens_per_s"] = tokens / statistics.median(seconds[name])
        lines.append(
            f"{name:10}{found['tokens_per_s']:7.0f} tokens/s, weights {found['load_s']:.3f} s; "
            f"import {found['import_s']:.1f} s, start {found['start_s']:.1f} s, first time "
            f"{found['first_s']:.1f} s; {found['memory_bytes'] / 2**20:.0f} MiB"
        )
    return {
        "seconds": {f"{name}_s": common.spread(values) for name, values in seconds.items()},
        "flops": {},
        "ways": result,
        "lines": lines,
    }


def main() -> int:
    """Measure and print."""
    options = common.parser(__doc__)
    options.add_argument("--eager", action="store_true", help="rollout.vllm.enforce_eager")
    return common.run(options.parse_args(), measure)


if __name__ == "__main__":
    sys.exit(main())
