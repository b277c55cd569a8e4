"""Gradients of policy and critic with and without recompute, and the bytes that are kept for them."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.training import OptimizerConfig
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.forward import logprob_forward, value_forward
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import sum_over_world
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.parallel.schedule import pipeline_forward_backward

FORWARDS = {"language": logprob_forward, "scalar": value_forward}


def batches(mesh):
    generator = torch.Generator().manual_seed(3)

    def text(size):
        return torch.randint(8, 50, (size,), generator=generator).tolist()

    options = {"multiple": mesh.sequence_multiple, "device": mesh.device}
    return [
        SequenceBatch.create([text(n) for n in (5, 9)], [text(n) for n in (12, 7)], **options)
        for _ in range(4)
    ]


def loss(output, _):
    grid = output if output.dim() == 2 else output.sum(0)
    weights = torch.linspace(0.5, 1.5, grid.shape[1])
    count = torch.tensor(float(grid.numel()))
    return LossOutput(loss_sum=(grid * weights).sum(), count=count, metrics={})


def kept_bytes(forward, total):
    """Run `forward` and add the bytes of the activations that autograd keeps after it."""

    def run(chunk, batch):
        weights = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward(chunk, batch)
        total.append(sum(kept.values()))
        return output

    return run


def gradients(config, mesh, head, folder):
    """Write this rank's gradients; return the norm and the bytes kept by all ranks."""
    chunks = build_chunks(config.model, config.precision, mesh, head=head, memory=config.memory)
    fill_random(chunks, mesh, seed=1)
    state = TrainState(chunks, OptimizerConfig(), total_steps=1)
    total = []
    state.zero_grad()
    microbatches = [SimpleNamespace(batch=batch) for batch in batches(mesh)]
    forward = kept_bytes(FORWARDS[head], total)
    pipeline_forward_backward(state.chunks, microbatches, forward, loss)
    found = {
        f"{number}.{name}": parameter.main_grad.clone()
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
    torch.save(found, folder / f"{head}_{mesh.rank}.pt")
    kept = sum_over_world(torch.tensor([float(sum(total))])).item()
    return {"grad_norm": state.step().grad_norm, "kept": kept}


def main():
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = []
    for number, case in enumerate(cases):
        config = Config.model_validate(case)
        mesh = create_mesh(config.parallel)
        folder = out.parent / f"gradients_{number}"
        folder.mkdir(exist_ok=True)
        results.append({head: gradients(config, mesh, head, folder) for head in FORWARDS})
        if mesh.rank == 0:
            out.write_text(json.dumps(results))
        destroy_mesh(leave_world=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
