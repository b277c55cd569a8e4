"""Time forward, backward and optimizer step of a random policy.

    python tools/benchmark/train_step.py --ranks 4 --tensor-size 2 --dtype float32

The loss is cross entropy on every response token. Prints readable lines and one JSON object. With
`--lora-rank` only adapters learn.
"""

import argparse
import sys

import common

from marlhf_mega.algorithm.losses import sft_loss
from marlhf_mega.checkpoint.weights import fill_adapters
from marlhf_mega.config.lora import LoraConfig
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.metrics.flops import forward_flops, training_flops
from marlhf_mega.models.adapter_dropout import dropping
from marlhf_mega.models.forward import logprob_forward, make_batches
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import pipeline_forward_backward


def measure(args: argparse.Namespace, config: Config, mesh: Mesh) -> common.Result:
    """Take optimizer steps on random sequences."""
    if args.lora_rank:
        lora = LoraConfig(rank=args.lora_rank, dropout=args.lora_dropout)
        config = config.model_copy(update={"model": config.model.adapted(lora)})
    chunks = common.build(config, mesh, "language", seed=args.seed)
    fill_adapters(chunks, mesh, seed=args.seed)
    steps = args.warmup + args.iters
    state = TrainState(chunks, config.policy, total_steps=steps, overlap=args.overlap)
    share, rest = divmod(args.batch, mesh.dp_size)
    if rest:
        raise ValueError(
            f"--batch={args.batch}: must be a multiple of the {mesh.dp_size} data-parallel ranks."
        )
    vocabulary = args.vocab
    prompts = common.random_tokens(args.seed, [args.prompt_len] * share, vocabulary)
    responses = common.random_tokens(args.seed + 1, [args.response_len] * share, vocabulary)
    size = -(-share // args.microbatches)
    limit = MicrobatchLimit(sequences=size)
    batches = make_batches(prompts, responses, limit=limit, mesh=mesh)
    mesh.platform.reset_memory_peak()

    def step(number: int) -> None:
        state.zero_grad()
        with dropping(state.chunks, number):
            pipeline_forward_backward(
                state.chunks,
                batches.microbatches,
                logprob_forward,
                lambda output, part: sft_loss(output[0], part.batch.response_mask),
            )
        state.step()

    seconds = common.spread(common.timed(mesh, step, warmup=args.warmup, iters=args.iters))
    length = args.prompt_len + args.response_len
    forward = forward_flops(
        config.model,
        [length] * args.batch,
        output_size=vocabulary,
        output_tokens=args.batch * args.response_len,
    )
    rate = args.batch * length / seconds["median"]
    held = {
        "weights": [p for chunk in chunks for p in chunk.parameters()],
        "gradients": state.gradient_buffers(),
        "optimizer": state.optimizer_tensors(),
    }
    sizes = {name: sum(t.nbytes for t in tensors) for name, tensors in held.items()}
    shown = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes.items())
    return {
        "seconds": {"step_s": seconds},
        "flops": {"step": training_flops(config.model, forward)},
        "tokens_per_s": rate,
        "bytes_on_rank_0": sizes,
        "lines": [f"{rate:.0f} tokens per second", f"on rank 0: {shown}"],
    }


def main() -> int:
    """Measure and print."""
    options = common.parser(__doc__)
    options.add_argument(
        "--microbatches", type=int, default=1, help="number of microbatches on each rank"
    )
    options.add_argument("--lora-rank", type=int, default=0, help="0: all weights learn")
    options.add_argument("--lora-dropout", type=float, default=0.0, help="as model.lora.dropout")
    options.add_argument("--overlap", action="store_true", help=common.OVERLAP_HELP)
    options.set_defaults(prompt_len=1, response_len=127)
    return common.run(options.parse_args(), measure)


if __name__ == "__main__":
    sys.exit(main())
