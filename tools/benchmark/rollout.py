"""Tokens per second that a random policy generates.

    python tools/benchmark/rollout.py --ranks 4 --lengths geometric:16:256 --slots 32

The end token stops nothing, so every response has exactly its requested length. Prints readable
lines and one JSON object.
"""

import argparse
import statistics
import sys

import common

from marlhf_mega.config.schema import Config
from marlhf_mega.metrics.flops import forward_flops
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.assignment import local_indices
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.train.generation import generator_in_place


def measure(args: argparse.Namespace, config: Config, mesh: Mesh) -> common.Result:
    """Time generation of the whole batch and of its first tokens."""
    if args.cuda_graphs and mesh.platform.name != "cuda":
        raise ValueError("--cuda-graphs: needs a CUDA device; there is none. Leave it out.")
    chunks = common.build(config, mesh, "language", seed=args.seed)
    graphs = config.rollout.model_copy(update={"cuda_graphs": args.cuda_graphs})
    config = config.model_copy(update={"rollout": graphs})
    generator = generator_in_place(chunks, config, mesh, stop=StopRule())
    own = local_indices(args.batch, args.batch, mesh)
    vocabulary = config.model.vocab_size or 0
    prompts = common.random_tokens(args.seed, [args.prompt_len] * args.batch, vocabulary)
    lengths = common.response_lengths(
        args.lengths, count=args.batch, fixed=args.response_len, seed=args.seed
    )
    mesh.platform.reset_memory_peak()

    def generate(step: int, limits: dict[int, int]) -> None:
        found = generator.generate(
            [prompts[i] for i in own],
            own,
            RolloutOptions(
                rule=SamplingRule(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p),
                max_response_tokens=limits,
                seed=args.seed,
                step=step,
                slots=None if args.slots is None else max(1, args.slots // mesh.dp_size),
            ),
        )
        assert [len(r) for r in found.responses] == [*limits.values()], (
            "every response has its requested length"
        )

    limits = {i: lengths[i] for i in own}
    often = {"warmup": args.warmup, "iters": args.iters}
    whole = common.timed(mesh, lambda step: generate(step, limits), **often)
    first = common.timed(mesh, lambda step: generate(step, dict.fromkeys(own, 1)), **often)
    forward = forward_flops(
        config.model,
        [args.prompt_len + n - 1 for n in lengths],
        output_size=vocabulary,
        output_tokens=sum(lengths),
    )
    rates = [sum(lengths) / s for s in whole]
    result: common.Result = {
        "seconds": {"rollout_s": common.spread(whole), "first_token_s": common.spread(first)},
        "flops": {"rollout": forward},
        "new_tokens": sum(lengths),
        "new_tokens_per_s": statistics.median(rates),
        "new_tokens_per_s_spread": common.spread(rates),
        "lines": [f"{statistics.median(rates):.0f} new tokens per second"],
    }
    if args.lengths is None and args.slots is None and args.response_len > 1:
        decode = (statistics.median(whole) - statistics.median(first)) / (args.response_len - 1)
        result |= decode_rates(args, config, mesh, chunks, seconds=decode)
        result["lines"].append(
            f"{1000 * decode:.2f} ms per decode step, {result['decode_bytes_per_s'] / 1e9:.1f} "
            f"GB/s of weights and cache, {result['decode_bandwidth_fraction']:.1%} of a copy's"
        )
    return result


def decode_rates(
    args: argparse.Namespace,
    config: Config,
    mesh: Mesh,
    chunks: list[StageModel],
    *,
    seconds: float,
) -> common.Result:
    """Compare the rate at which a decode step must read with that of a large copy."""
    model, item = config.model, next(chunks[0].parameters()).element_size()
    weights = sum(
        p.numel() for c in chunks for name, p in c.named_parameters() if "embedding" not in name
    )
    cache = 2 * model.num_layers * model.query_groups * model.kv_channels
    context = args.batch * (args.prompt_len + args.response_len / 2)
    # A pipeline reads its weights once per group of slots.
    groups = min(mesh.pp_size, args.batch // mesh.dp_size)
    rate = item * (common.total(mesh, weights) * groups + cache * context) / seconds
    bandwidth = common.copy_bandwidth(mesh)
    return {
        "decode_step_s": seconds,
        "decode_bytes_per_s": rate,
        "copy_bytes_per_s": bandwidth,
        "decode_bandwidth_fraction": rate / bandwidth,
    }


def main() -> int:
    """Measure and print."""
    options = common.parser(__doc__)
    options.add_argument("--lengths", help=common.LENGTHS_HELP)
    options.add_argument(
        "--slots", type=int, help="sequences decoded together over all ranks; None means all"
    )
    options.add_argument(
        "--cuda-graphs", action="store_true", help="launch a decode step as one CUDA graph"
    )
    options.add_argument("--temperature", type=float, default=1.0, help="0 decodes greedily")
    options.add_argument("--top-k", type=int, default=0, help="0 means all tokens")
    options.add_argument("--top-p", type=float, default=1.0, help="1 means all tokens")
    return common.run(options.parse_args(), measure)


if __name__ == "__main__":
    sys.exit(main())
