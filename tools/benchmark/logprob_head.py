"""Time and memory of vocabulary-parallel log-probs, entropies and their gradients.

    python tools/benchmark/logprob_head.py --ranks 2 --tensor-size 2 --tokens 1024 4096

Extra memory is the peak of forward and backward beyond the inputs, the results and the gradients of
hidden states and weight. Prints readable lines and one JSON object.
"""

import argparse
import sys

import common
import torch

from marlhf_mega.config.limits import padded_vocab_size
from marlhf_mega.config.schema import Config
from marlhf_mega.models.spec import compute_dtype
from marlhf_mega.parallel.collectives import max_over_world
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.vocab import VocabShard, vocab_parallel_logprobs


class HeadRun:
    """A weight shard and hidden states of some tokens; records the extra memory of its calls."""

    def __init__(self, args: argparse.Namespace, config: Config, mesh: Mesh, tokens: int) -> None:
        padded = padded_vocab_size(args.vocab, mesh.tp_size)
        self.shard = VocabShard.of(mesh, vocab_size=args.vocab, padded_size=padded)
        self.mesh, self.extra = mesh, 0
        make = torch.Generator().manual_seed(args.seed)
        dtype = compute_dtype(config.precision, mesh)
        self.hidden, self.weight = (
            torch.randn(rows, args.hidden, generator=make).to(mesh.device, dtype).requires_grad_()
            for rows in (tokens, padded // mesh.tp_size)
        )
        self.targets = torch.randint(args.vocab, (tokens,), generator=make).to(mesh.device)

    def __call__(self, _: int) -> None:
        """Run forward and backward once and record the extra bytes."""
        platform = self.mesh.platform
        platform.empty_cache()  # else this call would reuse memory that the last one has freed
        platform.reset_memory_peak()
        before = platform.memory_allocated()
        outputs = vocab_parallel_logprobs(self.hidden, self.weight, self.targets, shard=self.shard)
        gradients = torch.autograd.grad(torch.stack(outputs).sum(), (self.hidden, self.weight))
        kept = sum(tensor.nbytes for tensor in (*outputs, *gradients))
        self.extra = max(self.extra, platform.memory_peak() - before - kept)


def measure(args: argparse.Namespace, config: Config, mesh: Mesh) -> common.Result:
    """Run the head on each number of tokens."""
    seconds, flops, extra, lines = {}, {}, {}, []
    for tokens in args.tokens:
        run, phase = HeadRun(args, config, mesh, tokens), f"tokens_{tokens}"
        taken = common.timed(mesh, run, warmup=args.warmup, iters=args.iters)
        seconds[f"{phase}_s"] = common.spread(taken)
        # One product in the forward pass; the backward pass recomputes it and adds two.
        flops[phase] = 4 * 2.0 * tokens * args.hidden * args.vocab * mesh.dp_size
        most = max_over_world(torch.tensor([float(run.extra)], device=mesh.device))
        extra[str(tokens)] = int(most)
        lines.append(f"{tokens} tokens: {float(most) / 1e6:.0f} MB of extra memory")
    return {"seconds": seconds, "flops": flops, "extra_bytes": extra, "lines": lines}


def main() -> int:
    """Measure and print."""
    options = common.parser(__doc__)
    sizes = [1024, 4096, 16384]
    options.add_argument("--tokens", type=int, nargs="+", default=sizes, help="sizes to measure")
    options.set_defaults(vocab=256000, iters=1, ranks=2, tensor_size=2)
    return common.run(options.parse_args(), measure)


if __name__ == "__main__":
    sys.exit(main())
