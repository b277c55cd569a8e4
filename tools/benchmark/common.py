"""What the benchmarks share: options, a random model of the asked shape, medians, output."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import StageModel, build_chunks
from marlhf_mega.parallel.mesh import Mesh, create_mesh


def parser(about: str) -> argparse.ArgumentParser:
    """Return the options that decide shape, layout and measurement."""
    options = argparse.ArgumentParser(
        description=about + " Start it under torchrun for more than one rank.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    shape = {"hidden": 512, "layers": 8, "heads": 8, "kv-heads": 4, "ffn": 1408, "vocab": 4096}
    run = {"tensor-size": 1, "pipeline-size": 1, "threads": 1}
    measure = {"batch": 32, "prompt-len": 64, "response-len": 64, "warmup": 1, "iters": 5}
    for name, value in (shape | run | measure).items():
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    options.add_argument("--out", type=Path, help="also write the JSON here")
    return options


def start(options: argparse.Namespace) -> tuple[Config, Mesh]:
    """Join the world and resolve the configuration."""
    torch.set_num_threads(options.threads)
    config = Config.model_validate(
        {
            "model": {
                "num_layers": options.layers,
                "hidden_size": options.hidden,
                "num_attention_heads": options.heads,
                "num_query_groups": options.kv_heads,
                "ffn_hidden_size": options.ffn,
                "vocab_size": options.vocab,
                "max_positions": options.prompt_len + options.response_len,
            },
            "parallel": {
                "tensor_size": options.tensor_size,
                "pipeline_size": options.pipeline_size,
            },
            "precision": {"dtype": options.dtype},
        }
    )
    return config, create_mesh(config.parallel)


def random_model(config: Config, mesh: Mesh) -> list[StageModel]:
    """Build a policy with random weights."""
    chunks = build_chunks(config.model, config.precision, mesh, head="language")
    fill_random(chunks, mesh, seed=0)
    return chunks


def random_tokens(options: argparse.Namespace, mesh: Mesh, length: int) -> list[list[int]]:
    """Draw this replica's share of `batch` sequences."""
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    shape = (options.batch // mesh.dp_size, length)
    return torch.randint(options.vocab, shape, generator=generator).tolist()


def timed(work: Callable[[], object], options: argparse.Namespace, mesh: Mesh) -> dict[str, float]:
    """Run `work` for the asked iterations; median, min and max of the counted seconds."""
    seconds = []
    for _ in range(options.warmup + options.iters):
        mesh.platform.synchronize()
        begin = time.perf_counter()
        work()
        mesh.platform.synchronize()
        seconds.append(time.perf_counter() - begin)
    counted = seconds[options.warmup :]
    return {
        "median": statistics.median(counted),
        "min": min(counted),
        "max": max(counted),
    }


def gemm_peak(options: argparse.Namespace, mesh: Mesh, dtype: torch.dtype) -> float:
    """Measure the best rate of a large matrix product on this rank, operations per second."""
    size = 8192 if mesh.device.type == "cuda" else 1536
    left = torch.randn(size, size, device=mesh.device).to(dtype)
    seconds = timed(lambda: left @ left, options, mesh)
    return 2 * size**3 / seconds["min"]


def show(result: dict[str, Any], options: argparse.Namespace, mesh: Mesh) -> None:
    """Print readable lines and one JSON object, on rank 0."""
    if mesh.rank != 0:
        return
    result = {"layout": mesh.describe(), "device": mesh.platform.device_name, **result}
    for name, value in result.items():
        sys.stderr.write(f"{name}: {value}\n")
    text = json.dumps(result | {"options": {k: str(v) for k, v in vars(options).items()}})
    sys.stdout.write(text + "\n")
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
