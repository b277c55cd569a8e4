"""What ranks really allocate, beside what the planner says: OUT CASES."""

import json
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.checkpoint.reshard import connect
from marlhf_mega.checkpoint.weights import fill_adapters, fill_random
from marlhf_mega.config.schema import Config
from marlhf_mega.models.adapter_dropout import dropping
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.forward import logprob_forward, value_forward
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.shared_base import build_on_base, unshared_parameters
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.parallel.schedule import pipeline_forward_backward
from marlhf_mega.plan.activations import layer_kept, layer_shape
from marlhf_mega.plan.generation import Generation, kv_cache_bytes
from marlhf_mega.plan.memory import (
    formats_of,
    rollout_rank_memory,
    stage_memory,
    update_activations,
)
from marlhf_mega.plan.workload import workload
from marlhf_mega.rollout.generator import Generator, _Run
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.slots import Response
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions

FORWARDS = {"language": logprob_forward, "scalar": value_forward}


def loss(output, _):
    grid = output if output.dim() == 2 else output[0]
    return LossOutput(loss_sum=grid.sum(), count=torch.tensor(float(grid.numel())), metrics={})


def batches(work, mesh):
    """The update's microbatches at their longest."""
    size = work.microbatch
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    top = work.config.model.vocab_size

    sizes = [(size.seq - size.response, size.response)] * size.sequences
    rest = size.tokens - size.sequences * size.seq
    if rest:
        sizes.append((rest - size.response * rest // size.seq, size.response * rest // size.seq))

    def texts(part):
        return [torch.randint(0, top, (s[part],), generator=generator).tolist() for s in sizes]

    return [
        SequenceBatch.create(
            texts(0),
            texts(1),
            multiple=mesh.sequence_multiple,
            context_multiple=mesh.context_multiple,
            device=mesh.device,
            packed=size.packed is not None,
        )
        for _ in range(work.num_microbatches)
    ]


def highest(work):
    """Run `work`; return by how many bytes the allocator's total rose above its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    total = peak = 0
    for _, change in changes:
        total += change
        peak = max(peak, total)
    return peak


def most_saved(chunks, work):
    """Run `work`; return the most bytes that autograd saved at the same time, weights left out."""
    weights = {p.untyped_storage().data_ptr() for c in chunks for p in c.parameters()}
    holders, total, peak = {}, 0, 0

    class Saved:
        def __init__(self, tensor):
            nonlocal total, peak
            storage = tensor.untyped_storage()
            self.tensor, self.key, self.size = tensor, storage.data_ptr(), storage.nbytes()
            if self.key not in weights:
                holders[self.key] = holders.get(self.key, 0) + 1
                total += self.size if holders[self.key] == 1 else 0
                peak = max(peak, total)

        def __del__(self):
            nonlocal total
            if self.key not in weights:
                holders[self.key] -= 1
                total -= self.size if holders[self.key] == 0 else 0

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        work()
    return peak


def optimizer_bytes(state):
    found = 0
    for part in state.optimizers():
        inner = part.optimizer
        tensors = [t for values in inner.state.values() for t in values.values()]
        found += sum(t.nbytes for t in tensors if torch.is_tensor(t))
        masters = [p for group in part.shard_fp32_from_float16_groups for p in group]
        found += sum(p.nbytes for p in masters if p is not None)
    return found


def role_case(role, work, mesh, policy):
    """Build a role; train a step of it and measure, or only weigh it; `policy` gets its chunks."""
    config = work.config
    settings = (role.model, config.precision, mesh)
    if role.shares_base:
        chunks = build_on_base(policy, *settings, memory=config.memory)
    else:
        chunks = build_chunks(*settings, head=role.head, memory=config.memory)
        fill_random(chunks, mesh, seed=1)
    if role.model.lora.is_on:
        fill_adapters(chunks, mesh, seed=1)
    own = unshared_parameters(chunks, policy)
    policy += [] if policy else chunks
    if not role.learns:
        tensors = {p.untyped_storage()._cdata: p for p in own}
        return {"weights": sum(p.nbytes for p in tensors.values()), "gradients": 0, "optimizer": 0}
    mine = {p.untyped_storage()._cdata for p in own}
    frozen = [p for c in chunks for p in c.parameters() if not p.requires_grad]
    still = sum(p.nbytes for p in frozen if p.untyped_storage()._cdata in mine)
    state = TrainState(chunks, config.policy, total_steps=2)
    forward = FORWARDS[role.head]
    microbatches = [SimpleNamespace(batch=batch) for batch in batches(work, mesh)]

    def update():
        state.zero_grad()
        with dropping(state.chunks, 1):
            pipeline_forward_backward(state.chunks, microbatches, forward, loss)

    update()  # what Megatron allocates once is there
    # Messages may be freed late; the least of a few peaks is without them. Those between ranks that
    # share sequences are freed by threads that the profiler does not watch.
    layout = config.parallel
    is_told = not layout.sequence_parallel and layout.context_size == 1
    peak = min(highest(update) for _ in range(4)) if is_told else None
    saved = most_saved(chunks, update)
    state.step()
    parts = [b for c in state.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    return {
        "weights": sum(b.param_data.nbytes for b in parts) + still,
        "gradients": sum(b.grad_data.nbytes for b in parts),
        "optimizer": optimizer_bytes(state),
        "peak": peak,
        "saved": saved,
    }


def cache_bytes(work, generation, mesh):
    """Set a rollout up as the generator does."""
    config = work.config
    chunks = build_chunks(config.model, config.precision, mesh, head="language")
    limit = config.rollout.max_response_tokens
    prompt = [1] * config.data.max_prompt_tokens
    responses = [Response(i, prompt, limit) for i in range(generation.slots)]
    mask = config.rollout.mask_min_tokens if config.rollout.mask_interval else None
    run = _Run(
        Generator(chunks, mesh, stop=StopRule(frozenset({0})), second=chunks),
        deque(responses),
        torch.zeros(len(responses), dtype=torch.int64),
        RolloutOptions(
            rule=SamplingRule(temperature=1.0, min_kept=mask),
            max_response_tokens=limit,
            seed=0,
            step=0,
            slots=generation.slots,
        ),
    )
    decoders = (d for group in run.decoders for chunk in group for d in chunk)
    return sum(decoder.cache.nbytes for decoder in decoders)


def planned(work, stage):
    formats = formats_of(work.config.precision, on_gpu=False, has_engine=False)
    memory = stage_memory(work, stage, formats)
    found = {
        name: {"weights": role.weights, "gradients": role.gradients, "optimizer": role.optimizer}
        for name, role in memory.roles.items()
    }
    for role in (r for r in work.roles if r.learns):
        kept, extra = update_activations(work, role, stage, formats)
        shape = layer_shape(role, work.layout, work.microbatch, formats)
        again = work.config.memory.recompute == "full"
        found[role.name] |= {
            "peak": kept + extra + memory.phases["update"]["messages"],
            "saved": kept + (layer_kept(shape, work.config.memory) if again else 0),
        }
    return found | {"kv cache": kv_cache_bytes(work, Generation.of_rollout(work), formats)}


def job_case(work, mesh):
    """Every model of a job whose ranks train and generate."""
    policy = []
    built = [role for role in work.roles if not role.is_policy]
    real = {role.name: role_case(role, work, mesh, policy) for role in built}
    nothing = {"weights": 0, "gradients": 0, "optimizer": 0}
    real |= {role.name: nothing for role in work.roles if role.is_policy}
    real["kv cache"] = cache_bytes(work, Generation.of_rollout(work), mesh)
    return {"stage": mesh.pp_rank, "real": real, "planned": planned(work, mesh.pp_rank)}


def apart_case(work, mesh):
    """The policy and a move of its weights, where some ranks only generate."""
    formats = formats_of(work.config.precision, on_gpu=False, has_engine=False)
    chunks = build_chunks(work.config.model, work.config.precision, mesh, head="language")
    place = (chunks, mesh)
    if mesh.only_generates:
        resharder, generation = connect(None, place), Generation.of_rollout(work)
        memory = rollout_rank_memory(work, mesh.pp_rank, formats)
        held = memory.phases["rollout"]
    else:
        resharder, generation = connect(place, None), Generation.of_evaluation(work)
        memory = stage_memory(work, mesh.pp_rank, formats)
        held = memory.phases["evaluate"] | memory.phases["rollout"]
    real = {
        "weights": sum(p.nbytes for chunk in chunks for p in chunk.parameters()),
        "kv cache": cache_bytes(work, generation, mesh),
        "resharding buckets": highest(resharder.move),
    }
    names = ("kv cache", "resharding buckets")
    return {
        "only generates": mesh.only_generates,
        "real": real,
        "planned": {name: held[name] for name in names} | {"weights": held["policy weights"]},
    }


def main():
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = []
    for case in cases:
        config = Config.model_validate(case)
        num_rollout_ranks = config.rollout.ranks
        mesh = create_mesh(
            config.parallel,
            num_rollout_ranks=num_rollout_ranks,
            rollout_parallel=config.rollout_parallel,
        )
        work = workload(config, "ppo", mesh.launch.size)
        results.append(
            mesh.launch.gather((apart_case if num_rollout_ranks else job_case)(work, mesh))
        )
        if mesh.launch.rank == 0:
            out.write_text(json.dumps(results))
        destroy_mesh(leave_world=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
