"""Shared by the benchmarks: options, launch of ranks, random models and tokens, timing, output."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from marlhf_mega import platform
from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.checks import check_world
from marlhf_mega.config.model import Head
from marlhf_mega.config.schema import Config
from marlhf_mega.metrics.flops import peak_flops
from marlhf_mega.models.gpt import StageModel, build_chunks
from marlhf_mega.parallel.collectives import barrier, max_over_world, sum_over_world
from marlhf_mega.parallel.mesh import Mesh, create_mesh, destroy_mesh

EOS = 2
LENGTHS_HELP = "geometric:LOW:HIGH draws each response's length; None: --response-len for all"
OVERLAP_HELP = "overlap gradient reduction and parameter gathers with compute (parallel.overlap)"
OUT_HELP = "also write the JSON object to this file"

Result = dict[str, Any]
Measure = Callable[[argparse.Namespace, Config, Mesh], Result]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the line breaks of the description."""


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark: model, layout, work, repetitions."""
    options = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    shape = options.add_argument_group("model (Llama, random weights)")
    for name, default, about in (
        ("hidden", 512, "hidden size"),
        ("layers", 8, "transformer layers"),
        ("heads", 8, "attention heads"),
        ("kv-heads", 4, "key-value heads"),
        ("ffn", 1408, "feed-forward size"),
        ("vocab", 4096, "vocabulary size"),
    ):
        shape.add_argument(f"--{name}", type=int, default=default, help=about)
    dtypes = ["auto", "float32", "bfloat16"]
    shape.add_argument("--dtype", choices=dtypes, default="auto", help="auto: the device's own")
    formats = ["off", "hybrid", "e4m3"]
    shape.add_argument("--fp8", choices=formats, default="off", help="as precision.fp8")
    layout = options.add_argument_group("layout")
    layout.add_argument("--ranks", type=int, default=1, help="processes to start")
    layout.add_argument("--threads", type=int, default=1, help="CPU threads per rank")
    for axis in ("tensor", "pipeline", "context"):
        layout.add_argument(f"--{axis}-size", type=int, default=1, help=f"{axis}-parallel ranks")
    work = options.add_argument_group("work")
    work.add_argument("--batch", type=int, default=32, help="sequences over all ranks")
    work.add_argument("--prompt-len", type=int, default=64, help="tokens of a prompt")
    work.add_argument("--response-len", type=int, default=64, help="tokens of a response")
    work.add_argument("--seed", type=int, default=1234, help="of weights and tokens")
    work.add_argument("--warmup", type=int, default=1, help="iterations before the timed ones")
    work.add_argument("--iters", type=int, default=5, help="timed iterations")
    work.add_argument("--out", type=Path, help=OUT_HELP)
    return options


def run(args: argparse.Namespace, measure: Measure) -> int:
    """Start the ranks, call `measure` on each of them, and print the result on rank 0.

    Args:
        args: the parsed options.
        measure: returns `seconds` (the spread of each phase), `flops` per phase, readable `lines`
            and further entries of the JSON object, given the options, their configuration and this
            rank's mesh. It raises ValueError if the options do not fit.

    Returns:
        The exit code: 0 done, 2 wrong options.
    """
    world_size = platform.world_size()
    if args.ranks != world_size:
        _become_ranks(args)
    torch.set_num_threads(args.threads)
    try:
        config = make_config(args)
        support = platform.current().supports_fp8()
        if args.fp8 != "off" and not support:
            raise ValueError(f"--fp8={args.fp8}: cannot be used here; {support.reason}. Use off.")
        check_world(config, world_size)
        mesh = create_mesh(config.parallel)
        before = gemm_peaks(mesh, args.dtype)
        found = measure(args, config, mesh)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    memory = torch.tensor([float(mesh.platform.memory_peak())], device=mesh.device)
    after = gemm_peaks(mesh, args.dtype)
    result: Result = {
        "benchmark": Path(sys.argv[0]).stem,
        "layout": mesh.describe(),
        "device": mesh.platform.device_name,
        "torch": torch.__version__,
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "gemm_peak_flops": {name: max(before[name], after[name]) for name in before},
        "peak_memory_bytes": {
            "largest_rank": int(max_over_world(memory)),
            "all_ranks": int(sum_over_world(memory)),
        },
        **found,
    }
    add_rates(result, num_ranks=mesh.world_size)
    if mesh.rank == 0:
        show(result, args.out)
    destroy_mesh()
    return 0


def _become_ranks(args: argparse.Namespace) -> None:
    """Replace this process by torchrun with the same command; does not return."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(args.ranks), *sys.argv]
    sys.stdout.flush()
    os.execve(sys.executable, command, os.environ | {"OMP_NUM_THREADS": str(args.threads)})


def make_config(args: argparse.Namespace) -> Config:
    """Return the configuration that the options describe."""
    return Config.model_validate(
        {
            "run": {"seed": args.seed},
            "model": {
                "num_layers": args.layers,
                "hidden_size": args.hidden,
                "num_attention_heads": args.heads,
                "num_query_groups": args.kv_heads,
                "ffn_hidden_size": args.ffn,
                "vocab_size": args.vocab,
            },
            "parallel": {
                "tensor_size": args.tensor_size,
                "pipeline_size": args.pipeline_size,
                "context_size": args.context_size,
            },
            "precision": {"dtype": args.dtype, "fp8": args.fp8},
            "rollout": {"batch_size": args.batch, "max_response_tokens": args.response_len},
            "macro": {"rule": "fixed_ngram", "n": 5},
            "reward": {"source": "random"},
        }
    )


def build(config: Config, mesh: Mesh, head: Head, *, seed: int) -> list[StageModel]:
    """Return this rank's chunks of a model with random weights."""
    chunks = build_chunks(config.model, config.precision, mesh, head=head)
    fill_random(chunks, mesh, seed=seed)
    return chunks


def random_tokens(seed: int, lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Return one list of random token ids per length, without the end token."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(EOS + 1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def response_lengths(text: str | None, *, count: int, fixed: int, seed: int) -> list[int]:
    """Return the length of each response in tokens.

    Args:
        text: `geometric:LOW:HIGH` draws LOW plus a geometric number and clips at HIGH; the mean
            before clipping is LOW + (HIGH - LOW) / 4. None gives every response `fixed` tokens.
        count: number of responses.
        fixed: length without `text`.
        seed: of the draws.

    Raises:
        ValueError: `text` has another form.
    """
    if text is None:
        return [fixed] * count
    kind, *bounds = text.split(":")
    low, high = (int(b) if b.isdecimal() else 0 for b in (bounds + ["", ""])[:2])
    if kind != "geometric" or len(bounds) != 2 or not 0 < low < high:
        raise ValueError(f"--lengths={text}: must be geometric:LOW:HIGH with 0 < LOW < HIGH.")
    mean = (high - low) / 4
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Inverse of the distribution function 1 - q^(k + 1), k = 0, 1, ..., of mean q / (1 - q).
    extra = torch.log1p(-draws) / torch.log(torch.tensor(mean / (1 + mean), dtype=torch.float64))
    return (low + extra.long()).clamp(max=high).tolist()


def timed(mesh: Mesh, work: Callable[[int], object], *, warmup: int, iters: int) -> list[float]:
    """Return the slowest rank's seconds of each `work(iteration)` after the warm-up."""
    seconds = []
    for iteration in range(warmup + iters):
        barrier()
        mesh.platform.synchronize()
        start = time.perf_counter()
        work(iteration)
        mesh.platform.synchronize()
        seconds.append(slowest(mesh, time.perf_counter() - start))
    return seconds[warmup:]


def slowest(mesh: Mesh, seconds: float) -> float:
    """Return the maximum over all ranks."""
    return float(max_over_world(torch.tensor([seconds], dtype=torch.float64, device=mesh.device)))


def total(mesh: Mesh, value: float) -> float:
    """Return the sum of a number over all ranks."""
    return float(sum_over_world(torch.tensor([value], dtype=torch.float64, device=mesh.device)))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def gemm_peaks(mesh: Mesh, dtype: str, *, repeats: int = 9) -> dict[str, float]:
    """Measure the rate of matrix products that all ranks compute at the same time.

    Args:
        mesh: this rank's mesh.
        dtype: number format of the run.
        repeats: timed products; the median counts.

    Returns:
        FLOP/s summed over all ranks, through `torch.mm` and, on CPUs that have it, through oneDNN
        with reordered weights.
    """
    numbers = mesh.platform.default_dtype if dtype == "auto" else getattr(torch, dtype)
    size = 8192 if mesh.platform.name == "cuda" else 1024
    left, right = (torch.randn(size, size, device=mesh.device).to(numbers) for _ in range(2))
    ways: dict[str, Callable[[int], object]] = {"torch": lambda _: torch.mm(left, right)}
    if mesh.platform.name == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(right, size)
        ways["onednn"] = lambda _: torch.ops.mkldnn._linear_pointwise(
            left, packed, None, "none", [], ""
        )
    often = {"warmup": 2, "iters": repeats}
    return {
        name: 2 * size**3 * mesh.world_size / statistics.median(timed(mesh, product, **often))
        for name, product in ways.items()
    }


def copy_bandwidth(mesh: Mesh, *, repeats: int = 9) -> float:
    """Measure the bytes per second that large copies on all ranks read and write."""
    size = 1 << (28 if mesh.platform.name == "cuda" else 25)
    source = torch.zeros(size, device=mesh.device)
    target = torch.zeros_like(source)
    seconds = timed(mesh, lambda _: target.copy_(source), warmup=2, iters=repeats)
    return 8 * size * mesh.world_size / statistics.median(seconds)


def add_rates(result: Result, *, num_ranks: int) -> None:
    """Replace each phase's FLOPs by FLOP/s and fractions of the peaks, in place."""
    measured = max(result["gemm_peak_flops"].values())
    vendor = peak_flops(result["device"])
    result["phases"] = phases = {}
    for phase, flops in result.pop("flops").items():
        rate = flops / result["seconds"][f"{phase}_s"]["median"]
        phases[phase] = {"flops": flops, "flops_per_s": rate, "gemm_fraction": rate / measured}
        # The vendor's peak is for bfloat16.
        if vendor is not None and result["settings"]["dtype"] != "float32":
            phases[phase]["mfu"] = rate / (vendor * num_ranks)


def show(result: Result, out: Path | None) -> None:
    """Print readable lines, then the JSON object; write the object to `out` if given."""
    print(f"{result['benchmark']}: {result['layout']}, {result['settings']['threads']} thread(s)")
    peaks = result["gemm_peak_flops"].items()
    print("GEMM peak: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in peaks))
    for name, s in result["seconds"].items():
        line = f"{name:14}{s['median']:9.4f} (min {s['min']:.4f}, max {s['max']:.4f})"
        phase = result["phases"].get(name.removesuffix("_s"), {})
        if phase:
            line += f"  {phase['flops_per_s'] / 1e9:.1f} GFLOP/s, "
            line += f"{phase['gemm_fraction']:.1%} of the GEMM peak"
        if "mfu" in phase:
            line += f", MFU {phase['mfu']:.1%}"
        print(line)
    print("\n".join(result.pop("lines")))
    memory = result["peak_memory_bytes"]
    print(f"peak memory {memory['largest_rank'] / 2**30:.2f} GiB on the largest rank")
    write_json(result, out)


def write_json(found: Result, out: Path | None) -> None:
    """Print one JSON object; write it to `out` if given."""
    text = json.dumps(found)
    print(text)
    if out:
        out.write_text(text + "\n")
