"""Two ways of computing one gradient, compared at several layouts: OUT CASES."""

import json
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.schema import Config
from marlhf_mega.config.sections.training import OptimizerConfig
from marlhf_mega.models.forward import logprob_forward
from marlhf_mega.models.fp8 import without_fp8
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.parallel.schedule import pipeline_forward, pipeline_forward_backward
from marlhf_mega.update.fp8_guard import Divergence, Fp8Guard, compare
from tests.distributed.memory_ranks import batches, loss


@contextmanager
def scaled(chunks, factor):
    """Multiply every weight for a while; a power of two comes back exactly."""
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.mul_(factor)
    yield
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            parameter.div_(factor)


def whole(state, mesh):
    """Log-probs and the gradient of all weights, on one rank without data parallelism."""
    state.zero_grad()
    logprobs = pipeline_forward(state.chunks, batches(mesh), logprob_forward)
    microbatches = [SimpleNamespace(batch=batch) for batch in batches(mesh)]
    pipeline_forward_backward(state.chunks, microbatches, logprob_forward, loss)
    gradient = [p.main_grad.flatten().double() for c in state.chunks for p in c.parameters()]
    return torch.cat([x[0].flatten() for x in logprobs]), torch.cat(gradient)


def by_hand(state, mesh, other):
    logprobs, gradient = whole(state, mesh)
    with other():
        other_logprobs, other_gradient = whole(state, mesh)
    gap = (logprobs - other_logprobs).abs()
    cosine = torch.nn.functional.cosine_similarity(gradient, other_gradient, dim=0)
    return {
        # Padding has no log-prob, so it differs by nothing.
        "logprob_gap": (gap.sum() / (gap > 0).sum()).item(),
        "logprob_gap_max": gap.max().item(),
        "gradient_cosine": cosine.item(),
    }


def main():
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = []
    for case in cases:
        config = Config.model_validate(case)
        mesh = create_mesh(config.parallel)
        chunks = build_chunks(config.model, config.precision, mesh, head="language")
        fill_random(chunks, mesh, seed=1)
        state = TrainState(chunks, OptimizerConfig(), total_steps=1)
        others = {
            "same": nullcontext,
            "without FP8": partial(without_fp8, chunks),
            "scaled": partial(scaled, chunks, 0.5),
        }
        if mesh.world_size == 1:
            others["bfloat16"] = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
        microbatches = [SimpleNamespace(batch=batch) for batch in batches(mesh)]
        found = {
            name: asdict(compare(state, microbatches, loss, forward=logprob_forward, other=other))
            for name, other in others.items()
        }
        guard = Fp8Guard(config, mesh, chunks)
        found["formats"] = []
        for cosine in (0.95, 0.85):
            guard.judge(
                Divergence(logprob_gap=0.0, logprob_gap_max=0.0, gradient_cosine=cosine), step=3
            )
            formats = {layer.config.fp8 for c in chunks for layer in c.decoder.layers}
            found["formats"].append([guard.has_left, *formats])
        found["left over"] = max(float(b.abs().max()) for b in state.gradient_buffers())
        if mesh.world_size == 1:
            found["by hand"] = by_hand(state, mesh, others["scaled"])
        results.append(found)
        if mesh.rank == 0:
            out.write_text(json.dumps(results))
        destroy_mesh(leave_world=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
