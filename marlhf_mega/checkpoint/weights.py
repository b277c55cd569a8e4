"""Fill a model's parameters with initial weights, equal at every layout."""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from marlhf_mega.algorithm.counter_rng import fold, normal, uniform
from marlhf_mega.checkpoint.hf.adapters import AdapterTable
from marlhf_mega.checkpoint.hf.importer import import_weights
from marlhf_mega.checkpoint.hf.parameters import (
    LocalParameter,
    adapter_parameters,
    find_shards,
    local_parameters,
    own_parameters,
)
from marlhf_mega.checkpoint.hf.table import Layout, Shard, WeightTable
from marlhf_mega.checkpoint.sharded import HEAD, replicas_of
from marlhf_mega.checkpoint.store import load_weights
from marlhf_mega.config.hf_families import HfHead
from marlhf_mega.config.limits import padded_vocab_size
from marlhf_mega.config.lora import LoraConfig
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.origin import Origin
from marlhf_mega.models.fp8 import round_weights
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.lora import attach, merge_for_good
from marlhf_mega.parallel.collectives import broadcast_from, sum_over_world
from marlhf_mega.parallel.mesh import Mesh

_BLOCK = 1 << 22
"""Elements drawn at a time, so that a large matrix needs little extra memory."""
_APART = 0x5851F42D4C957F2D
"""Odd: keeps the keys of neighbouring elements apart by more than their values differ."""


def table_of(chunks: Sequence[StageModel]) -> WeightTable:
    """Return the weight table of a model."""
    head: HfHead = "causal_lm" if chunks[0].head == "language" else "sequence_classification"
    return WeightTable(chunks[0].model, head)


def adapter_table_of(chunks: Sequence[StageModel]) -> AdapterTable:
    """Return the weight table of a model's adapters."""
    return AdapterTable(chunks[0].model, "causal_lm")


def learning_parts(
    chunks: Sequence[StageModel],
) -> list[tuple[list[LocalParameter], WeightTable]]:
    """Return what a model with adapters learns, adapters and a scalar head, with their tables."""
    heads = [p for p in local_parameters(chunks) if p.name == HEAD and chunks[0].head == "scalar"]
    parts: list[tuple[list[LocalParameter], WeightTable]] = [
        (adapter_parameters(chunks), adapter_table_of(chunks))
    ]
    return [*parts, (heads, table_of(chunks))]


def layout_of(mesh: Mesh, model: ModelConfig) -> Layout:
    """Return this rank's position in the terms of the weight table."""
    assert model.vocab_size is not None
    groups = mesh.groups
    return Layout(
        padded_vocab_size=padded_vocab_size(model.vocab_size, mesh.tp_size),
        tp_rank=mesh.tp_rank,
        tp_size=mesh.tp_size,
        ep_rank=mesh.ep_rank,
        ep_size=mesh.ep_size,
        etp_rank=groups.expt_tp.rank(),
        etp_size=groups.expt_tp.size(),
        data_rank=groups.dp_cp.rank(),
        expert_data_rank=groups.expt_dp.rank(),
    )


@torch.no_grad()
def fill_random(
    chunks: Sequence[StageModel], mesh: Mesh, *, seed: int, only: str | None = None
) -> None:
    """Draw the parameters; every element is a function of (seed, tensor name, its index).

    Norms start as the identity and biases at zero. Matrices are normal with `model.init_std`; those
    that write to the residual stream are divided by sqrt(2 * num_layers) (GPT-2). A scalar head has
    standard deviation 1 / sqrt(hidden_size + 1) (Stiennon et al. 2020).

    Args:
        chunks: this rank's chunks of one model.
        mesh: this rank's mesh.
        seed: the run's seed.
        only: fill only parameters whose name starts with this; None means all.
    """
    model, table = chunks[0].model, table_of(chunks)
    layout = layout_of(mesh, model)
    wanted = [p for p in local_parameters(chunks) if only is None or p.name.startswith(only)]
    for local, shard in find_shards(wanted, table, layout):
        name, parameter = local.name, local.tensor
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(0.0 if model.zero_centered_norm else 1.0)
        else:
            std = _standard_deviation(name, chunks[0])
            parameter.zero_()
            for values, key, index in elements_of(parameter, shard, table):
                values.copy_(normal(fold(seed, key, index)) * std)
    for name, weight in own_parameters(chunks).items():
        if name.endswith("bias"):
            weight.zero_()
            continue
        keys = fold(seed, zlib.crc32(name.encode()), torch.arange(weight.numel()))
        drawn = normal(keys.to(weight.device)).view(weight.shape)
        weight.copy_(drawn / math.sqrt(weight.shape[1] + 1))
    round_weights(chunks)


def _standard_deviation(name: str, chunk: StageModel) -> float:
    model = chunk.model
    if name == "output_layer.weight" and chunk.head == "scalar":
        return 1 / math.sqrt(model.hidden_size + 1)
    # Grouped experts have a number behind the name.
    if name.rstrip("0123456789").endswith(("linear_proj.weight", "linear_fc2.weight")):
        return model.init_std / math.sqrt(2 * model.num_layers)
    return model.init_std


def elements_of(
    parameter: Tensor, shard: Shard, table: WeightTable
) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield a parameter without padding, a block of rows at a time.

    Yields:
        The values, a view; a key of their Hugging Face tensor; the index of every element in that,
        int64 of the values' shape.
    """
    done = 0
    for piece in shard.pieces:
        values = parameter.narrow(piece.dim, done, piece.size)
        done += piece.size
        if piece.name is None:
            continue
        shape = table.tensors[piece.name]
        columns = shape[1] if len(shape) > 1 else 1
        row_lo = piece.lo if piece.dim == 0 else 0
        column_lo, column_hi = (piece.lo, piece.hi) if piece.dim == 1 else (0, columns)
        key = zlib.crc32(piece.name.encode())
        column = torch.arange(column_lo, column_hi, device=values.device)
        step = max(1, _BLOCK // len(column))
        for lo in range(0, len(values), step):
            part = values[lo : lo + step]
            row = torch.arange(row_lo + lo, row_lo + lo + len(part), device=values.device)
            index = row[:, None] * columns + column
            yield part, key, index.view(part.shape)


def fill_from(
    origin: Origin,
    chunks: Sequence[StageModel],
    mesh: Mesh,
    *,
    seed: int,
    import_once: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Fill a model from a run directory or a Hugging Face folder, at any layout.

    A scalar head that the origin lacks (a critic initialised from a policy) is drawn randomly.

    Args:
        origin: where the weights are.
        chunks: this rank's chunks of one model.
        mesh: this rank's mesh.
        seed: the run's seed.
        import_once: the first data-parallel replica reads a Hugging Face folder and broadcasts it
            to the others.
        progress: called with the number of bytes read from a Hugging Face folder.

    Returns:
        Names of the tensors that were drawn randomly, the same on every rank.
    """
    if chunks[0].head == "scalar":
        fill_random(chunks, mesh, seed=seed, only="output_layer")
    if origin.lora.is_on:
        return fill_merged(origin, chunks, mesh, seed=seed, import_once=import_once)
    if origin.is_run:
        return load_weights(origin.path, chunks, mesh)
    fresh = import_weights(
        origin.path,
        local_parameters(chunks),
        table_of(chunks),
        layout_of(mesh, chunks[0].model),
        allow_fresh_head=chunks[0].head == "scalar",
        broadcast=partial(_send_to_replicas, mesh=mesh) if import_once else None,
        progress=progress,
    )
    round_weights(chunks)
    return fresh


def fill_merged(
    origin: Origin,
    chunks: Sequence[StageModel],
    mesh: Mesh,
    *,
    seed: int,
    import_once: bool = False,
    role: str | None = None,
) -> list[str]:
    """Fill a model from a run with adapters: the run's base, and what its adapters learned.

    Args:
        origin: a run with `lora` on.
        chunks: this rank's chunks, without adapters.
        mesh: this rank's mesh.
        seed: see `fill_from`.
        import_once: see `fill_from`.
        role: see `load_weights`.

    Raises:
        RuntimeError: the base is not that of the run.
    """
    if origin.base is None:
        fill_random(chunks, mesh, seed=origin.seed)
    else:
        fill_from(origin.base, chunks, mesh, seed=seed, import_once=import_once)
    fresh: list[str] = []

    def load() -> None:
        fresh.extend(load_weights(origin.path, chunks, mesh, role=role))

    merge_loaded(chunks, origin.lora, mesh, load)
    return fresh


def merge_loaded(
    chunks: Sequence[StageModel], lora: LoraConfig, mesh: Mesh, load: Callable[[], None]
) -> None:
    """Give a filled model adapters, fill these with `load`, and merge them into the weights."""
    own, digest = chunks[0].model, digest_of_base(chunks, mesh)
    for chunk in chunks:
        chunk.model, chunk.base_digest = own.adapted(lora), digest
        attach(chunk, mesh)
    load()
    merge_for_good(chunks)
    for chunk in chunks:
        chunk.model, chunk.base_digest = own, None


@torch.no_grad()
def fill_adapters(chunks: Sequence[StageModel], mesh: Mesh, *, seed: int) -> None:
    """Draw new adapters, every element a function of (seed, tensor name, its index).

    As in peft, A is uniform with Kaiming's bound, 1 / sqrt(inputs), and B is zero.
    """
    table, layout = adapter_table_of(chunks), layout_of(mesh, chunks[0].model)
    for local, shard in find_shards(adapter_parameters(chunks), table, layout):
        local.tensor.zero_()
        if local.name.endswith(".a"):
            bound = table.tensors[str(shard.pieces[0].name)][1] ** -0.5
            for values, key, index in elements_of(local.tensor, shard, table):
                values.copy_((uniform(fold(seed, key, index)) * 2 - 1) * bound)


@torch.no_grad()
def digest_of_base(chunks: Sequence[StageModel], mesh: Mesh) -> str:
    """Return a hash of the weights that adapters leave frozen, the same at every layout.

    A language head of its own has a second hash, since the same body may get a scalar head. Each is
    a sum over the elements, modulo 2^64, and so does not depend on who adds which. All ranks call
    it.
    """
    totals = torch.zeros(2, dtype=torch.int64, device=mesh.device)
    table, layout, head = table_of(chunks), layout_of(mesh, chunks[0].model), chunks[0].head
    for local, shard in find_shards(local_parameters(chunks), table, layout):
        if not shard.is_primary or (head == "scalar" and local.name == HEAD):
            continue
        for values, key, index in elements_of(local.tensor, shard, table):
            bits = values.float().contiguous().view(torch.int32).to(torch.int64)
            # One round of mixing for all three, as there are many elements.
            totals[int(local.name == HEAD)] += fold(key + index * _APART + bits).sum()
    body, own = (f"{total % 2**64:016x}" for total in sum_over_world(totals).tolist())
    return body if head == "scalar" or chunks[0].model.tied_embeddings else f"{body}-{own}"


def _send_to_replicas(name: str, tensor: Tensor, *, mesh: Mesh) -> None:
    # The exact values of an FP8 weight are in host memory, from which NCCL cannot send.
    sent = tensor.to(mesh.device)
    broadcast_from(0, sent, replicas_of(name, mesh))
    if sent is not tensor:
        tensor.copy_(sent)
