"""Time import from and export to a Hugging Face folder, relative to the disk's own rate.

    python tools/benchmark/conversion.py --ranks 4 --tensor-size 2 --pipeline-size 2
    python tools/benchmark/conversion.py --plan --tensor-size 8 --pipeline-size 4

By default the model is a random Llama of 1.1 billion parameters in bfloat16. Imports are cold (the
files are dropped from the page cache first) and warm. They alternate with sequential reads (cold)
and writes (synced) of one process. Extra memory is the growth of a rank's anonymous pages during
conversion; pages of mapped files, which the system can drop at any time, do not count. `--plan`
runs nothing and computes what an import of Llama-3-70B needs on the most loaded rank.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import common
import torch

from marlhf_mega.checkpoint.hf.parameters import local_parameters
from marlhf_mega.checkpoint.weights import fill_from
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.origin import find_origin
from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.parallel.collectives import broadcast_object
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.train.export import export_hf

BLOCK = 1 << 24


def measure(args: argparse.Namespace, config: Config, mesh: Mesh) -> common.Result:
    """Alternate export, cold import, warm import, sequential write and sequential read."""
    path = tempfile.mkdtemp(dir=args.folder) if mesh.rank == 0 else ""
    scratch = Path(broadcast_object(path))
    folder, plain = scratch / "hf", scratch / "plain"
    chunks = build_chunks(config.model, config.precision, mesh, head="language")
    for parameter in local_parameters(chunks):
        parameter.tensor.data.normal_(std=0.02)
    extra = {"export": 0, "import": 0}
    seconds: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        with own_memory() as grown:
            (taken,) = common.timed(mesh, lambda _: work(), warmup=0, iters=1)
        seconds.setdefault(f"{name}_s", []).append(taken)
        phase = name.partition("_")[0]
        if phase in extra:
            extra[phase] = max(extra[phase], grown[0])

    num_bytes = export_hf(chunks, config, mesh, target=folder).num_bytes
    origin = find_origin(folder, key="folder")
    first = mesh.rank == 0
    for _ in range(args.warmup + args.iters):
        timed("export", lambda: export_hf(chunks, config, mesh, target=folder))
        if first:
            drop_cached(sorted(folder.glob("*.safetensors")))
        timed("import_cold", lambda: fill_from(origin, chunks, mesh, seed=0))
        timed("import_warm", lambda: fill_from(origin, chunks, mesh, seed=0))
        timed("disk_write", lambda: write_plain(plain, num_bytes) if first else None)
        if first:
            drop_cached([plain])
        timed("disk_read", lambda: read_plain(plain) if first else None)
    if mesh.rank == 0:
        shutil.rmtree(scratch)
    spreads = {name: common.spread(values[args.warmup :]) for name, values in seconds.items()}
    rates = {name.removesuffix("_s"): num_bytes / s["median"] for name, s in spreads.items()}
    largest = {name: int(common.slowest(mesh, float(value))) for name, value in extra.items()}
    shares = {
        "import_cold_of_disk_read": rates["import_cold"] / rates["disk_read"],
        "export_of_disk_write": rates["export"] / rates["disk_write"],
    }
    return {
        "seconds": spreads,
        "flops": {},
        "bytes": num_bytes,
        "bytes_per_s": rates,
        **shares,
        "extra_memory_bytes": largest,
        "lines": [
            *(f"{name}: {rate / 1e6:.0f} MB/s" for name, rate in rates.items()),
            *(f"{name}: {share:.0%}" for name, share in shares.items()),
            *(f"{name}: {size / 2**20:.0f} MiB of extra memory" for name, size in largest.items()),
        ],
    }


@contextmanager
def own_memory() -> Iterator[list[int]]:
    """Yield a list of one number: by how many bytes this process's anonymous pages grew."""
    before, grown, stop = own_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            grown[0] = max(grown[0], own_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield grown
    stop.set()
    thread.join()


def own_bytes() -> int:
    """Return the bytes of resident anonymous pages."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def drop_cached(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def write_plain(path: Path, num_bytes: int) -> None:
    """Write a file sequentially and flush it to disk."""
    block = os.urandom(BLOCK)
    with path.open("wb") as file:
        for done in range(0, num_bytes, BLOCK):
            file.write(block[: num_bytes - done])
        file.flush()
        os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    """Read a file sequentially."""
    block = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(block):
            pass


def plan(args: argparse.Namespace) -> int:
    """Compute from shapes what an import of Llama-3-70B needs on the first rank; print it."""
    from marlhf_mega.checkpoint.hf.table import Layout, WeightTable
    from marlhf_mega.config.sections.hardware import ParallelConfig
    from marlhf_mega.plan.layout import WorldLayout
    from marlhf_mega.plan.parameters import chunk_parameters

    model = ModelConfig(
        num_layers=80,
        hidden_size=8192,
        num_attention_heads=64,
        num_query_groups=8,
        ffn_hidden_size=28672,
        vocab_size=128256,
    )
    layout = Layout(padded_vocab_size=model.vocab_size or 0, tp_size=args.tensor_size)
    table = WeightTable(model, "causal_lm")
    degrees = ParallelConfig(tensor_size=args.tensor_size, pipeline_size=args.pipeline_size)
    ranks = WorldLayout.of(degrees, degrees.model_size)
    parameters = chunk_parameters(model, ranks, head="language", stage=0, chunk=0)
    # All layers have the same shapes.
    shards = [table.shard(p.name, 0, layout) for p in parameters]
    sizes = [parameter.size for parameter in parameters]
    largest = max(
        torch.Size(shard.shape).numel() * piece.size // shard.shape[piece.dim]
        for shard in shards
        for piece in shard.pieces
    )
    found = {
        "computed": f"Llama-3-70B, bfloat16, TP{args.tensor_size} x PP{args.pipeline_size}, rank 0",
        "parameters": sum(sizes),
        "weights_bytes": 2 * sum(sizes),
        "largest_slice_bytes": 2 * largest,
        "read_bytes": 2 * sum(sizes),
    }
    print(json.dumps(found))
    return 0


def main() -> int:
    """Run the benchmark."""
    options = common.parser(__doc__)
    options.add_argument("--folder", help="where to write; None means the temporary folder")
    options.add_argument("--plan", action="store_true", help="only compute what 70B needs")
    options.set_defaults(
        hidden=2048, layers=16, heads=32, kv_heads=8, ffn=8192, vocab=32000, dtype="bfloat16",
        ranks=4, tensor_size=2, pipeline_size=2, iters=3,
    )  # fmt: skip
    args = options.parse_args()
    return plan(args) if args.plan else common.run(args, measure)


if __name__ == "__main__":
    sys.exit(main())
