"""Run and export every model with adapters at several layouts: OUT FOLDER LAYOUTS."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.checkpoint.hf.peft import import_adapters
from marlhf_mega.checkpoint.weights import digest_of_base, fill_from, layout_of, learning_parts
from marlhf_mega.config.lora import LoraConfig
from marlhf_mega.config.origin import find_origin
from marlhf_mega.config.peft import lora_from_peft
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.models.forward import (
    logprob_forward,
    make_batches,
    run_forward,
    score_forward,
)
from marlhf_mega.models.gpt import attach_adapters, build_chunks
from marlhf_mega.models.lora import merged_adapters, without_adapters
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.parallel.schedule import pipeline_forward_backward
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.train.export import export_hf, export_peft
from tests.distributed.hf_reference import PROMPTS, RESPONSES


def loaded(folder, config, mesh, head):
    origin = find_origin(folder / "base", key="model.hf_path")
    lora = lora_from_peft(folder / "adapter", LoraConfig())
    precision = config.precision.model_copy(update={"dtype": "float32"})
    model = origin.model.adapted(lora)
    memory = config.memory
    chunks = build_chunks(model, precision, mesh, head=head, memory=memory, adapters=False)
    fill_from(origin, chunks, mesh, seed=0)
    before = rows_of(chunks, mesh)
    attach_adapters(chunks, mesh)
    digest = digest_of_base(chunks, mesh)
    for chunk in chunks:
        chunk.base_digest = digest
    layout = layout_of(mesh, model)
    import_adapters(folder / "adapter", learning_parts(chunks), layout, digest=digest)
    return chunks, before


def rows_of(chunks, mesh):
    batches = make_batches(PROMPTS, RESPONSES, limit=MicrobatchLimit(sequences=2), mesh=mesh)
    if chunks[0].head == "scalar":
        grid = run_forward(chunks, batches, score_forward)
        return [[grid[i, len(r) - 1].item()] for i, r in enumerate(RESPONSES)]
    grid, _ = run_forward(chunks, batches, logprob_forward, leading=(2,))
    return [grid[i, : len(r)].tolist() for i, r in enumerate(RESPONSES)]


def greedy(chunks, mesh):
    rule = SamplingRule(temperature=0.0)
    options = RolloutOptions(rule=rule, max_response_tokens=6, seed=0, step=0, slots=2)
    made = Generator(chunks, mesh, stop=StopRule()).generate(PROMPTS, [0, 1, 2], options)
    return made.responses, made.logprobs.tolist()


def loss_of(output, held):
    batch = held.batch
    if output.dim() == 3:
        mask = batch.response_mask
        values = output[0]
    else:
        places = torch.arange(output.shape[1])
        mask = places == (batch.response_lengths[:, None] - 1)
        values = output
    return LossOutput(loss_sum=-(values * mask).sum(), count=mask.sum().float(), metrics={})


def gradients(chunks, mesh, folder):
    """Export the gradients of the mean, as if they were adapters; returns the loss."""
    state = TrainState(chunks, Config().policy, total_steps=1)
    state.zero_grad()
    scalar = chunks[0].head == "scalar"
    batches = make_batches(PROMPTS, RESPONSES, limit=MicrobatchLimit(sequences=2), mesh=mesh)
    held = [SimpleNamespace(batch=m.batch) for m in batches.microbatches]
    forward = score_forward if scalar else logprob_forward
    losses = pipeline_forward_backward(state.chunks, held, forward, loss_of)
    total = torch.tensor([sum(x.loss_sum.item() for x in losses)])
    total = total if mesh.reports_metrics else torch.zeros(1)
    dist.all_reduce(total)
    names = [n for c in chunks for n, p in c.named_parameters() if p.requires_grad]
    assert all(".lora." in n or n == "output_layer.weight" for n in names), names
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter.main_grad)
                else:
                    assert not hasattr(parameter, "main_grad")
    export_peft(chunks, mesh, target=folder)
    return total.item() / (len(RESPONSES) if scalar else sum(map(len, RESPONSES)))


def bits(chunks):
    return [p.detach().clone() for c in chunks for p in c.parameters()]


def main():
    out, folder, layouts = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    found = {}
    for name, keys in layouts.items():
        config = Config.model_validate(
            {"parallel": keys["parallel"], "memory": keys.get("memory", {})}
        )
        mesh = create_mesh(config.parallel)
        for path in sorted(folder.iterdir()):
            head = "scalar" if path.name.endswith("_reward") else "language"
            chunks, before = loaded(path, config, mesh, head)
            weights = bits(chunks)
            target = path / "exports" / name
            target.mkdir(parents=True, exist_ok=True)
            run = config.run.model_copy(update={"dir": target})
            export_hf(chunks, config.model_copy(update={"run": run}), mesh, target=target / "hf")
            answer = {"outputs": rows_of(chunks, mesh)}
            with without_adapters(chunks):
                answer["off"] = rows_of(chunks, mesh) == before
            if head == "language":
                answer["greedy"], answer["sampled"] = greedy(chunks, mesh)
                with merged_adapters(chunks), without_adapters(chunks):
                    answer["merged_greedy"], answer["merged_sampled"] = greedy(chunks, mesh)
            same = zip(weights, bits(chunks), strict=True)
            answer["restored"] = all(a.equal(b) for a, b in same)
            answer["loss"] = gradients(chunks, mesh, target / "gradients")
            found[f"{path.name}/{name}"] = answer
        destroy_mesh(leave_world=False)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
