"""Time and memory of log-probs, entropies and their gradients from a sharded vocabulary.

    python tools/benchmark/logprob_head.py --ranks 2 --tensor-size 2 [--vocab 256000 --tokens ...]

Extra memory is the peak of forward and backward above what was there before and what stays: the
results and the gradients of hidden states and weight. Prints readable lines and one JSON object.
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
    """A weight shard, hidden states of so many tokens, and what they cost."""

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
        """Run forward and backward once; note the extra bytes."""
        platform = self.mesh.platform
        self.hidden.grad = self.weight.grad = None
        platform.empty_cache()  # else a run would use again what the one before it has freed
        platform.reset_memory_peak()
        before = platform.memory_allocated()
        outputs = vocab_parallel_logprobs(self.hidden, self.weight, self.targets, shard=self.shard)
        torch.stack(outputs).sum().backward()
        kept = sum(x.nbytes for x in (*outputs, self.hidden.grad, self.weight.grad))
        self.extra = max(self.extra, platform.memory_peak() - before - kept)


def measure(args: argparse.Namespace, config: Config, mesh: Mesh) -> common.Result:
    """Run the head on every asked number of tokens."""
    seconds, flops, extra, lines = {}, {}, {}, []
    for tokens in args.tokens:
        run, phase = HeadRun(args, config, mesh, tokens), f"tokens_{tokens}"
        taken = common.timed(mesh, run, warmup=args.warmup, iters=args.iters)
        seconds[f"{phase}_s"] = common.spread(taken)
        # One product forward; backward makes the logits again and has two of its own.
        flops[phase] = 4 * 2.0 * tokens * args.hidden * args.vocab * mesh.dp_size
        most = max_over_world(torch.tensor([float(run.extra)], device=mesh.device))
        extra[str(tokens)] = int(most)
        lines.append(f"{tokens} tokens: {float(most) / 1e6:.0f} MB beyond results and gradients")
    return {"seconds": seconds, "flops": flops, "extra_bytes": extra, "lines": lines}


def main() -> int:
    """Measure and print."""
    options = common.parser(__doc__.partition("\n")[0])
    options.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384])
    options.set_defaults(vocab=256000, iters=1, ranks=2, tensor_size=2)
    args = options.parse_args()
    return common.run(args, lambda config, mesh: measure(args, config, mesh))


if __name__ == "__main__":
    sys.exit(main())
