"""What a tiny model says on this process's device.

    python tools/acceptance/tiny_answers.py OUT float32 [FOLDER]
    python tools/acceptance/tiny_answers.py tools/acceptance/answers.json references

Without FOLDER the weights are random, the same on every device; with it they are read from a
Hugging Face folder that holds `sequences.json` too. `references` writes what a CPU says, with which
a GPU is compared: in float32, in bfloat16, and in float32 with the weights that bfloat16 has.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.checkpoint.weights import fill_from, fill_random
from marlhf_mega.config.model import Head, ModelConfig
from marlhf_mega.config.origin import Origin, find_origin
from marlhf_mega.config.sections.hardware import ParallelConfig, PrecisionConfig
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.models.forward import logprob_forward, make_batches, run_forward, value_forward
from marlhf_mega.models.gpt import StageModel, build_chunks
from marlhf_mega.parallel.mesh import Mesh, create_mesh, destroy_mesh
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions

TINY = ModelConfig(
    num_layers=3,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=96,
    vocab_size=100,
    qkv_bias=True,
    qk_norm=True,
    init_std=0.2,
)
PROMPTS = [[5, 9, 14], [77, 3, 8, 21, 40, 6], [31] * 4]
RESPONSES = [[8, 90, 4, 7], [12], [60, 61, 62, 63, 64, 65, 66]]

Answers = dict[str, Any]


def answers(
    mesh: Mesh, dtype: str, *, rounded: bool = False, folder: Path | None = None
) -> Answers:
    """Return log-probs, entropies, values and greedy responses of a policy and a critic.

    Args:
        mesh: of one rank.
        dtype: `float32` or `bfloat16`.
        rounded: round the random weights to bfloat16 first.
        folder: Hugging Face folder with the policy and its sequences.
    """
    prompts, responses, origin = PROMPTS, RESPONSES, None
    if folder is not None:
        origin = find_origin(folder, key="model.hf_path")
        prompts, responses = json.loads((folder / "sequences.json").read_text())
    policy, critic = (
        _build(head, PrecisionConfig(dtype=dtype), mesh, origin, rounded=rounded)
        for head in ("language", "scalar")
    )
    limit, packed_limit = (
        MicrobatchLimit(sequences=2),
        MicrobatchLimit(sequences=1, tokens=80, packed=True),
    )
    padded, packed = (
        make_batches(prompts, responses, limit=each, mesh=mesh) for each in (limit, packed_limit)
    )
    logprobs, entropies = run_forward(policy, padded, logprob_forward, leading=(2,))
    packed_logprobs, _ = run_forward(policy, packed, logprob_forward, leading=(2,))
    values, packed_values = (run_forward(critic, b, value_forward) for b in (padded, packed))
    plain = _greedy(policy, mesh, prompts, cuda_graphs=False)
    graphs = _greedy(policy, mesh, prompts, cuda_graphs=mesh.platform.name == "cuda")
    return {
        "device": mesh.platform.name,
        "logprobs": _by_row(logprobs, responses),
        "entropies": _by_row(entropies, responses),
        "values": _by_row(values, responses),
        "packed_logprobs": _by_row(packed_logprobs, responses),
        "packed_values": _by_row(packed_values, responses),
        "greedy": plain[0],
        "greedy_logprobs": plain[1],
        "graphs": graphs[0],
        "graphs_logprobs": graphs[1],
    }


def _build(
    head: Head, precision: PrecisionConfig, mesh: Mesh, origin: Origin | None, *, rounded: bool
) -> list[StageModel]:
    chunks = build_chunks(origin.model if origin else TINY, precision, mesh, head=head)
    if origin and head == "language":
        assert fill_from(origin, chunks, mesh, seed=3) == []
        return chunks
    fill_random(chunks, mesh, seed=3)
    if rounded:
        with torch.no_grad():
            for chunk in chunks:
                for weight in chunk.parameters():
                    weight.copy_(weight.bfloat16())
    return chunks


def _greedy(
    policy: list[StageModel], mesh: Mesh, prompts: Sequence[list[int]], *, cuda_graphs: bool
) -> tuple[list[list[int]], list[list[float]]]:
    generator = Generator(policy, mesh, stop=StopRule(frozenset({2})), cuda_graphs=cuda_graphs)
    rule = SamplingRule(temperature=0.0)
    options = RolloutOptions(rule=rule, max_response_tokens=12, seed=0, step=0, slots=2)
    found = generator.generate(prompts, range(len(prompts)), options)
    return found.responses, _by_row(found.logprobs, found.responses)


def _by_row(grid: Tensor, responses: Sequence[list[int]]) -> list[list[float]]:
    return [row[: len(r)] for row, r in zip(grid.tolist(), responses, strict=True)]


def references(mesh: Mesh) -> dict[str, Answers]:
    """Return what this device says in three ways."""
    return {
        "float32": answers(mesh, "float32"),
        "bfloat16": answers(mesh, "bfloat16"),
        "rounded": answers(mesh, "float32", rounded=True),
    }


def main() -> None:
    """Write the answers."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("out", type=Path, metavar="OUT", help="JSON file")
    options.add_argument("what", choices=["float32", "bfloat16", "references"], help="which")
    options.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="of the policy")
    args = options.parse_args()
    mesh = create_mesh(ParallelConfig())
    if args.what == "references":
        found = references(mesh)
    else:
        found = answers(mesh, args.what, folder=args.folder)
    args.out.write_text(json.dumps(found) + "\n")
    destroy_mesh()


if __name__ == "__main__":
    main()
