"""The acceptance steps: each returns what it found and raises where something is wrong."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import speed
import torch
from sizes import BILLION, SMALL, Found, Sizes, Skip, one_rank, policy
from tiny_answers import answers

from marlhf_mega.cli import main as marlhf
from marlhf_mega.models.offload import Offloaded
from marlhf_mega.parallel.mesh import Mesh

__all__ = ["BILLION", "SMALL", "STEPS", "Sizes", "Skip"]

REFERENCES = Path(__file__).with_name("answers.json")
TOLERANCE = 1e-4
BF16_SLACK = 2.0
"""How much further from float32 a GPU's bfloat16 may be than a CPU's."""


def check_answers(sizes: Sizes) -> Found:
    """A tiny model says what it says on a CPU: padded, packed, decoded, with and without graphs."""
    expected = json.loads(REFERENCES.read_text())
    with one_rank() as mesh:
        float32, bfloat16 = answers(mesh, "float32"), answers(mesh, "bfloat16")
        found: Found = {"offloaded_bytes": _offload_and_back(sizes, mesh)}
    for name in ("greedy", "graphs"):
        _require(float32[name] == expected["float32"][name], f"float32 {name} tokens differ")
    for name, rows in expected["float32"].items():
        if name in ("device", "greedy", "graphs"):
            continue
        found[f"float32_{name}_error"] = error = _largest_difference(float32[name], rows)
        _require(error < TOLERANCE, f"float32 {name} differ by {error}")
    for name in ("logprobs", "packed_logprobs", "values", "packed_values"):
        exact = expected["rounded"][name]
        here, cpu = (_mean_difference(x[name], exact) for x in (bfloat16, expected["bfloat16"]))
        found[f"bfloat16_{name}_error_over_cpu"] = here / cpu
        _require(here < BF16_SLACK * cpu, f"bfloat16 {name}: off by {here}, on a CPU by {cpu}")
    return found


def _offload_and_back(sizes: Sizes, mesh: Mesh) -> int:
    weights = [p.data for chunk in policy(sizes, mesh) for p in chunk.parameters()]
    before = [w.clone() for w in weights]
    with tempfile.TemporaryDirectory() as folder:
        offloaded = Offloaded(lambda: weights, mesh.platform, Path(folder))
        offloaded.release()
        num_bytes = offloaded.num_bytes
        offloaded.hold()
    same = all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    _require(same, "weights that were offloaded came back changed")
    return num_bytes


def quickstart(sizes: Sizes) -> Found:
    """SFT, reward model and PPO, packed, and with CUDA graphs where there is a GPU."""
    with one_rank() as mesh:
        on_gpu = mesh.platform.name == "cuda"
    return _run_quickstart([*sizes.quickstart, f"rollout.cuda_graphs={on_gpu}".lower()])


def fp8(sizes: Sizes) -> Found:
    """The training step and the quickstart in FP8."""
    with one_rank() as mesh:
        if not (support := mesh.platform.supports_fp8()):
            raise Skip(support.reason)
    return {
        "training": speed.train_step(sizes, fp8="hybrid"),
        "quickstart": _run_quickstart([*sizes.quickstart, "precision.fp8=hybrid"]),
    }


def _run_quickstart(options: Sequence[str]) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        packed = ["ppo.packing=true", "ppo.microbatch_tokens=400"]
        code = marlhf(["quickstart", f"run.dir={folder}", *packed, *options])
        _require(code == 0, f"quickstart ended with {code}")
        lines = (Path(folder) / "ppo" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    _require(last["rollout/logprob_gap"] < 0.05, "sampler and trainer disagree")
    shown = ("rollout/logprob_gap", "rollout/tokens_per_second", "policy/fp8_logprob_gap")
    times = [name for name in last if name.startswith("time/")]
    return {name: last[name] for name in (*shown, *times) if name in last}


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise AssertionError(complaint)


def _flat(rows: list[list[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def _differences(rows: list[list[float]], others: list[list[float]]) -> list[float]:
    return [abs(a - b) for a, b in zip(_flat(rows), _flat(others), strict=True)]


def _largest_difference(rows: list[list[float]], others: list[list[float]]) -> float:
    return max(_differences(rows, others))


def _mean_difference(rows: list[list[float]], others: list[list[float]]) -> float:
    differences = _differences(rows, others)
    return sum(differences) / len(differences)


STEPS: dict[str, Callable[[Sizes], Found]] = {
    "answers": check_answers,
    "decode": speed.decode,
    "attention": speed.attention,
    "training": speed.training,
    "copies": speed.copies,
    "quickstart": quickstart,
    "fp8": fp8,
}
