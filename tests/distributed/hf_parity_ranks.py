"""Import every model folder at several layouts, run it, export it: OUT FOLDER LAYOUTS SCRATCH."""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open

from marlhf_mega.checkpoint.weights import fill_from
from marlhf_mega.config.checks import check_world
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.origin import find_origin
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.models.forward import last_token_scores, logprob_forward, make_batches, run_forward
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.train.export import export_hf
from tests.distributed.hf_reference import NEW_TOKENS, PROMPTS, RESPONSES


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def same_files(one, other):
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and first[k].equal(second[k]) for k in first
    )


def answers_of(folder, config, mesh, scratch):
    origin = find_origin(folder, key="model.hf_path")
    head = "scalar" if folder.name.endswith("_reward") else "language"
    dtype = "bfloat16" if folder.name == "llama3" else "float32"
    precision = config.precision.model_copy(update={"dtype": "float32"})
    chunks = build_chunks(origin.model, precision, mesh, head=head)
    once = mesh.dp_size > 1  # one replica reads for the others, and the first rank writes
    assert fill_from(origin, chunks, mesh, seed=0, import_once=once) == []
    batches = make_batches(PROMPTS, RESPONSES, limit=MicrobatchLimit(sequences=2), mesh=mesh)
    if head == "scalar":
        answer = {"scores": last_token_scores(chunks, batches).tolist()}
    else:
        grid, _ = run_forward(chunks, batches, logprob_forward, leading=(2,))
        generator = Generator(chunks, mesh, stop=StopRule())
        made = generator.generate(
            PROMPTS,
            [0, 1, 2],
            RolloutOptions(
                rule=SamplingRule(temperature=0.0),
                max_response_tokens=NEW_TOKENS,
                seed=0,
                step=0,
                slots=2,
            ),
        )
        answer = {
            "logprobs": [grid[i, : len(r)].tolist() for i, r in enumerate(RESPONSES)],
            "greedy": made.responses,
        }
    if dtype == "float32":
        target = scratch / folder.name
        run = config.run.model_copy(update={"dir": scratch / "no-tokenizer"})
        checkpoint = config.checkpoint.model_copy(update={"export_from_first": once})
        settings = config.model_copy(update={"run": run, "checkpoint": checkpoint})
        export_hf(chunks, settings, mesh, target=target)
        answer["export_exact"] = same_files(folder, target)
    return answer


def main():
    out, folder, layouts, scratch = (
        *map(Path, sys.argv[1:3]),
        json.loads(sys.argv[3]),
        sys.argv[4],
    )
    found = {}
    for name, parallel in layouts.items():
        config = Config.model_validate({"parallel": parallel})
        mesh = create_mesh(config.parallel)
        for model in sorted(folder.iterdir()):
            origin = find_origin(model, key="model.hf_path")
            try:
                whole = config.model_copy(update={"model": origin.model})
                check_world(whole, mesh.world_size)
            except ConfigError:
                continue
            key = f"{name}/{model.name}"
            found[key] = answers_of(model, config, mesh, Path(scratch) / name)
        destroy_mesh(leave_world=False)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
