"""Time moving a policy's weights from the training layout to the rollout layout and back.

    python tools/benchmark/reshard.py --ranks 4 --tensor-size 2 --pipeline-size 2

By default 1.1 billion parameters move from TP2 x PP2 to four full replicas. Each move alternates
with a broadcast of as many bytes as the model has. Prints readable lines and one JSON object.
"""

import argparse
import statistics
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence

import common
import torch
import torch.distributed as dist
from torch import Tensor

from marlhf_mega.checkpoint.hf.parameters import local_parameters
from marlhf_mega.checkpoint.hf.table import WeightTable
from marlhf_mega.checkpoint.reshard import connect, describe
from marlhf_mega.checkpoint.weights import layout_of, table_of
from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import StageModel, build_chunks
from marlhf_mega.parallel.collectives import any_rank
from marlhf_mega.parallel.mesh import Mesh, create_second_mesh, use_mesh
from marlhf_mega.parallel.reshard_plan import Block

BROADCAST_BYTES = 1 << 28


def measure(args: argparse.Namespace, config: Config, mesh: Mesh) -> common.Result:
    """Alternate moves there, moves back and broadcasts."""
    sizes = {"tensor_size": args.rollout_tensor_size, "pipeline_size": args.rollout_pipeline_size}
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update=sizes)})
    second = create_second_mesh(config.rollout_parallel, mesh)
    trained = build_chunks(config.model, config.precision, mesh, head="language")
    with use_mesh(second):
        away = build_chunks(config.model, config.precision, second, head="language")
    numbers = trained[0].config.params_dtype
    tensors = WeightTable(config.model, "causal_lm").tensors
    num_parameters = sum(torch.Size(shape).numel() for shape in tensors.values())
    num_bytes = num_parameters * numbers.itemsize
    bucket_bytes = args.bucket_mib << 20
    there = connect((trained, mesh), (away, second), bucket_bytes=bucket_bytes)
    back = connect((away, second), (trained, mesh), bucket_bytes=bucket_bytes)
    for tensor, pattern in parts(trained, mesh):
        tensor.copy_(pattern())
    buffer = torch.zeros(min(num_bytes, BROADCAST_BYTES), dtype=torch.uint8, device=mesh.device)

    def broadcast(_: int) -> None:
        for done in range(0, num_bytes, BROADCAST_BYTES):
            dist.broadcast(buffer[: num_bytes - done], src=0)

    works = {
        "there": lambda _: there.move(),
        "back": lambda _: back.move(),
        "broadcast": broadcast,
    }
    seconds = alternate(works, args, mesh)
    exact = all([is_exact(trained, mesh), is_exact(away, second)])  # both communicate
    rate = {name: num_bytes / statistics.median(values) for name, values in seconds.items()}
    return {
        "seconds": {f"{name}_s": common.spread(values) for name, values in seconds.items()},
        "flops": {},
        "rollout_layout": second.describe(),
        "parameters": num_parameters,
        "model_bytes": num_bytes,
        "moved_bytes": {"there": there.total_bytes, "back": back.total_bytes},
        "bucket_bytes": bucket_bytes,
        "bytes_per_s": rate,
        "broadcast_fraction": {name: rate[name] / rate["broadcast"] for name in ("there", "back")},
        "bit_exact": exact,
        "lines": [
            f"{num_parameters / 1e9:.2f} billion parameters, {num_bytes / 2**30:.2f} GiB, "
            f"{there.total_bytes / 2**30:.2f} GiB between ranks there, "
            f"{back.total_bytes / 2**30:.2f} GiB back; to {second.describe()}",
            *(
                f"{name}: {rate[name] / 2**30:.2f} GiB of model per second, "
                f"{rate[name] / rate['broadcast']:.0%} of a broadcast"
                for name in ("there", "back")
            ),
            f"bit-exact: {exact}",
        ],
    }


def alternate(
    works: Mapping[str, Callable[[int], object]], args: argparse.Namespace, mesh: Mesh
) -> dict[str, list[float]]:
    """Time the works in turn, iteration after iteration; return the seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    mesh.platform.reset_memory_peak()
    for iteration in range(args.warmup + args.iters):
        for name, work in works.items():
            found = common.timed(mesh, work, warmup=0, iters=1)
            seconds[name] += found if iteration >= args.warmup else []
    return seconds


def is_exact(chunks: Sequence[StageModel], mesh: Mesh) -> bool:
    """Whether all slices on all ranks have their expected values, bit by bit."""
    exact = all(torch.equal(tensor, pattern()) for tensor, pattern in parts(chunks, mesh))
    return not any_rank(not exact, mesh.device)


def parts(chunks: Sequence[StageModel], mesh: Mesh) -> list[tuple[Tensor, "Pattern"]]:
    """List this rank's slices of the full tensors, each with its expected values."""
    parameters = local_parameters(chunks)
    found = []
    for block in describe(parameters, table_of(chunks), layout_of(mesh, chunks[0].model)):
        tensor = parameters[block.parameter].tensor.detach()
        part = tensor.narrow(block.dim, block.start, block.hi - block.lo)
        found.append((part, Pattern(block, part)))
    return found


class Pattern:
    """Values of a slice that depend only on its place in the full tensor, not on the layout."""

    def __init__(self, block: Block, part: Tensor) -> None:
        self.block, self.part = block, part

    def __call__(self) -> Tensor:
        """Return the slice's expected values."""
        places = [torch.arange(n, device=self.part.device) for n in self.part.shape]
        places[self.block.dim] += self.block.lo
        key = zlib.crc32(self.block.tensor.encode())
        mixed = (places[0] * 7919 + key) % 8191
        if len(places) == 2:
            mixed = (mixed.int()[:, None] + (places[1] * 31).int()) % 8191
        return mixed.to(self.part.dtype)


def main() -> int:
    """Measure and print."""
    options = common.parser(__doc__)
    options.set_defaults(hidden=2048, layers=16, heads=32, kv_heads=8, ffn=8192, vocab=32768)
    options.set_defaults(dtype="bfloat16", ranks=4, tensor_size=2, pipeline_size=2)
    for axis in ("tensor", "pipeline"):
        about = f"{axis}-parallel ranks of the rollout"
        options.add_argument(f"--rollout-{axis}-size", type=int, default=1, help=about)
    options.add_argument("--bucket-mib", type=int, default=128, help="MiB of all buckets together")
    return common.run(options.parse_args(), measure)


if __name__ == "__main__":
    sys.exit(main())
