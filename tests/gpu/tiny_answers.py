"""What a tiny model says on this process's device: `python tiny_answers.py OUT DTYPE [FOLDER]`.

Without FOLDER the weights are random, the same on every device; with it they are read from a
Hugging Face folder that holds `sequences.json` too.
"""

import json
import sys
from pathlib import Path

from marlhf_mega.checkpoint.weights import fill_from, fill_random
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.origin import find_origin
from marlhf_mega.config.schema import ParallelConfig, PrecisionConfig
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.experience.forward import forward_rows
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.roles import LogprobStep, value_step
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule

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


def build(head, precision, mesh, origin):
    chunks = build_chunks(origin.model if origin else TINY, precision, mesh, head=head)
    if origin and head == "language":
        assert fill_from(origin, chunks, mesh, seed=3) == []
    else:
        fill_random(chunks, mesh, seed=3)
    return chunks


def by_row(grid, responses):
    return [row[: len(r)] for row, r in zip(grid.tolist(), responses, strict=True)]


def main():
    out, precision = Path(sys.argv[1]), PrecisionConfig(dtype=sys.argv[2])
    prompts, responses, origin = PROMPTS, RESPONSES, None
    if len(sys.argv) > 3:
        folder = Path(sys.argv[3])
        origin = find_origin(folder, key="model.hf_path")
        prompts, responses = json.loads((folder / "sequences.json").read_text())
    mesh = create_mesh(ParallelConfig())
    policy = build("language", precision, mesh, origin)
    critic = build("scalar", precision, mesh, origin)
    rows = {"mesh": mesh, "prompts": prompts, "responses": responses}
    packed = rows | {"limit": MicrobatchLimit(rows=1, tokens=80, packed=True)}
    rows["limit"] = MicrobatchLimit(rows=2)
    language = {"run": LogprobStep(1.0), "leading": (2,)}
    logprobs, entropies = forward_rows(policy, **rows, **language)
    values = forward_rows(critic, **rows, run=value_step)

    def greedy(**options):
        return Generator(policy, mesh, eos_id=2, **options).generate(
            prompts,
            range(len(prompts)),
            rule=SamplingRule(temperature=0.0),
            max_response_tokens=12,
            seed=0,
            step=0,
            slots=2,
        )

    plain, graphs = greedy(), greedy(cuda_graphs=mesh.platform.name == "cuda")
    answers = {
        "device": mesh.platform.name,
        "logprobs": by_row(logprobs, responses),
        "entropies": by_row(entropies, responses),
        "values": by_row(values, responses),
        "packed_logprobs": by_row(forward_rows(policy, **packed, **language)[0], responses),
        "packed_values": by_row(forward_rows(critic, **packed, run=value_step), responses),
        "greedy": plain.responses,
        "greedy_logprobs": by_row(plain.logprobs, plain.responses),
        "graphs": graphs.responses,
        "graphs_logprobs": by_row(graphs.logprobs, graphs.responses),
    }
    out.write_text(json.dumps(answers))
    destroy_mesh()


if __name__ == "__main__":
    main()
