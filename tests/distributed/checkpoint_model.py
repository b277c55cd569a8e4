"""A tiny model that trains, for the rank scripts of the checkpoint tests."""

import hashlib
from types import SimpleNamespace

import torch
import torch.distributed as dist

from marlhf_mega.algorithm.losses import LossOutput
from marlhf_mega.checkpoint.weights import digest_of_base, fill_adapters, fill_random
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.sections.hardware import PrecisionConfig
from marlhf_mega.config.sections.training import OptimizerConfig
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.schedule import pipeline_forward, pipeline_forward_backward

# The rows of 40 words are padded to 48 for one tensor-parallel rank and to 64 for two or four.
VOCAB = 40


def make_chunks(
    mesh, *, head="language", seed=1, dtype="float32", tied=False, base_seed=1, **changes
):
    sizes = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "ffn_hidden_size": 64,
        "vocab_size": VOCAB,
        "init_std": 0.2,
        "qkv_bias": True,
    }
    model = ModelConfig(**(sizes | changes), tied_embeddings=tied)
    chunks = build_chunks(model, PrecisionConfig(dtype=dtype), mesh, head=head)
    # The weights of adapters' base are always the same.
    fill_random(chunks, mesh, seed=base_seed if model.lora.is_on else seed)
    if model.lora.is_on:
        digest = digest_of_base(chunks, mesh)
        for chunk in chunks:
            chunk.base_digest = digest
        fill_adapters(chunks, mesh, seed=seed)
    return chunks


def make_role(mesh, **options):
    optimizer = OptimizerConfig(
        lr=1e-2, min_lr=1e-3, warmup_steps=2, lr_schedule="cosine", weight_decay=0.1
    )
    return TrainState(make_chunks(mesh, **options), optimizer, total_steps=8)


def microbatches(step, mesh):
    """The global batch of a step, cut for this rank."""
    generator = torch.Generator().manual_seed(step)
    prompts = [
        torch.randint(0, VOCAB, (3 + i % 3,), generator=generator).tolist() for i in range(8)
    ]
    responses = [
        torch.randint(0, VOCAB, (4 + i * 5 % 7,), generator=generator).tolist() for i in range(8)
    ]
    share = 8 // mesh.dp_size
    first = mesh.dp_rank * share
    return [
        SequenceBatch.create(
            prompts[i : i + 2],
            responses[i : i + 2],
            multiple=mesh.tp_size,
            device=mesh.device,
        )
        for i in range(first, first + share, 2)
    ]


def train(role, mesh, steps):
    """Return [loss, gradient norm, learning rate] of every step."""
    return [_step(role, mesh, step) for step in steps]


def _step(role, mesh, step):
    role.zero_grad()
    held = [SimpleNamespace(batch=batch) for batch in microbatches(step, mesh)]
    losses = pipeline_forward_backward(role.chunks, held, lambda chunk, batch: chunk(batch), _loss)
    done = role.step()
    total = torch.tensor(
        [sum(x.loss_sum.item() for x in losses), sum(x.count.item() for x in losses)],
        dtype=torch.float64,
    )
    dist.all_reduce(total)
    return [(total[0] / total[1]).item(), done.grad_norm, done.lr]


def _loss(output, microbatch):
    batch = microbatch.batch
    values = output[0] if output.dim() == 3 else output
    return LossOutput(
        loss_sum=(values * batch.response_mask).pow(2).sum(),
        count=batch.response_mask.sum().float(),
        metrics={},
    )


def outputs(chunks, mesh):
    """The model's answers on step 0's first two rows of replica 0, on every rank."""
    found = pipeline_forward(chunks, microbatches(0, mesh)[:2], lambda chunk, batch: chunk(batch))
    box = [found[0].float().flatten().tolist() if found else None]
    dist.broadcast_object_list(box, src=mesh.world_size - mesh.dp_size * mesh.tp_size)
    return box[0]


def parts(role):
    return getattr(role.optimizer, "chained_optimizers", [role.optimizer])


def digests(role):
    """A hash of all weights, master weights, moments and counters of each rank."""
    tensors = [p for chunk in role.chunks for p in chunk.parameters()]
    for part in parts(role):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                tensors += [parameter, *(state[name] for name in sorted(state))]
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, total.hexdigest())
    return found
