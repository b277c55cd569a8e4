"""Fill a model's parameters: the first weights of every role, the same in every layout."""

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from marlhf_mega.algorithm.counter_rng import fold
from marlhf_mega.checkpoint.hf.importer import import_weights
from marlhf_mega.checkpoint.hf.parameters import find_shards, local_parameters
from marlhf_mega.checkpoint.hf.reader import open_folder
from marlhf_mega.checkpoint.hf.table import Layout, Piece, WeightTable
from marlhf_mega.checkpoint.store import SCALAR_ROLES, load_weights
from marlhf_mega.config.limits import padded_vocab_size
from marlhf_mega.config.origin import Origin
from marlhf_mega.models.fp8 import round_weights
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.collectives import broadcast_from_first
from marlhf_mega.parallel.mesh import Mesh

_BLOCK = 1 << 22
"""Elements drawn at a time, so that a large matrix needs little extra memory."""


def layout_of(mesh: Mesh, vocab_size: int) -> Layout:
    """Say where this rank stands in the terms of the weight table."""
    groups = mesh.groups
    return Layout(
        padded_vocab_size=padded_vocab_size(vocab_size, mesh.tp_size),
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
    """Draw the parameters: every element is a function of (seed, tensor name, its index).

    Norms start as the identity and biases at zero. Matrices are normal with `model.init_std`;
    those that write to the residual stream are divided by sqrt(2 * num_layers) (GPT-2), a scalar
    head has standard deviation 1 / sqrt(hidden_size + 1) (Stiennon et al. 2020).

    Args:
        chunks: this rank's chunks of one model.
        mesh: where this rank stands.
        seed: of the run.
        only: fill just the parameters whose name starts with this.
    """
    model = chunks[0].model
    assert model.vocab_size is not None
    table = WeightTable(
        model, "causal_lm" if chunks[0].head == "language" else "sequence_classification"
    )
    layout = layout_of(mesh, model.vocab_size)
    wanted = [p for p in local_parameters(chunks) if only is None or p.name.startswith(only)]
    for local, shard in find_shards(wanted, table, layout):
        name, parameter = local.name, local.tensor
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(0.0 if model.zero_centered_norm else 1.0)
        else:
            std = _standard_deviation(name, chunks[0])
            done = 0
            for piece in shard.pieces:
                target = parameter.narrow(piece.dim, done, piece.size)
                _draw_piece(target, piece, table, std=std, seed=seed)
                done += piece.size
    round_weights(chunks)


def _standard_deviation(name: str, chunk: StageModel) -> float:
    model = chunk.model
    if name == "output_layer.weight" and chunk.head == "scalar":
        return 1 / math.sqrt(model.hidden_size + 1)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return model.init_std / math.sqrt(2 * model.num_layers)
    return model.init_std


def _draw_piece(target: Tensor, piece: Piece, table: WeightTable, *, std: float, seed: int) -> None:
    if piece.name is None:
        target.zero_()
        return
    rows, columns = table.tensors[piece.name]
    row_lo, row_hi = (piece.lo, piece.hi) if piece.dim == 0 else (0, rows)
    column_lo, column_hi = (piece.lo, piece.hi) if piece.dim == 1 else (0, columns)
    name_key = zlib.crc32(piece.name.encode())
    column = torch.arange(column_lo, column_hi, device=target.device)
    step = max(1, _BLOCK // len(column))
    for lo in range(row_lo, row_hi, step):
        row = torch.arange(lo, min(lo + step, row_hi), device=target.device)
        draws = _normal(fold(seed, name_key, row[:, None] * columns + column))
        target[lo - row_lo : lo - row_lo + len(row)] = (draws * std).to(target.dtype)


def _normal(bits: Tensor) -> Tensor:
    """Box-Muller on the two halves of each 64-bit hash; float32, same shape."""
    high = ((bits >> 32) & 0xFFFFFFFF).to(torch.float64)
    low = (bits & 0xFFFFFFFF).to(torch.float64)
    radius = torch.sqrt(-2.0 * torch.log((high + 1) / 2**32))
    return (radius * torch.cos(low * (2 * math.pi / 2**32))).to(torch.float32)


def roles_of(origin: Origin, *, key: str) -> set[str]:
    """Return the roles whose weights an origin holds; a folder's model is a policy or a reward.

    Raises:
        ValueError: its weight files cannot be opened.
    """
    if not origin.is_run:
        is_scalar = "score.weight" in open_folder(origin.path, key=key).names
        return {"reward" if is_scalar else "policy"}
    checkpoints = (origin.path / "checkpoints").iterdir()
    return {role for c in checkpoints for role in ("policy", *SCALAR_ROLES) if (c / role).is_dir()}


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

    A scalar head that the origin does not have (a critic started from a policy) is drawn afresh.

    Args:
        origin: where the weights are.
        chunks: this rank's chunks of one model.
        mesh: where this rank stands.
        seed: of the run.
        import_once: the first data-parallel replica reads a Hugging Face folder for the others.
        progress: called with the number of bytes read from a Hugging Face folder.

    Returns:
        Names of the tensors that were freshly initialised, the same on every rank.
    """
    if chunks[0].head == "scalar":
        fill_random(chunks, mesh, seed=seed, only="output_layer")
    if origin.is_run:
        return load_weights(origin.path, chunks, mesh)
    model = chunks[0].model
    assert model.vocab_size is not None
    table = WeightTable(
        model, "causal_lm" if chunks[0].head == "language" else "sequence_classification"
    )
    report = import_weights(
        origin.path,
        local_parameters(chunks),
        table,
        layout_of(mesh, model.vocab_size),
        allow_fresh_head=chunks[0].head == "scalar",
        broadcast=partial(_send_to_replicas, mesh=mesh) if import_once else None,
        progress=progress,
    )
    round_weights(chunks)
    return list(report.fresh)


def _send_to_replicas(name: str, tensor: Tensor, *, mesh: Mesh) -> None:
    is_expert = ".mlp.experts." in name
    # The exact values of a weight in FP8 are on the host, from where GPUs send nothing.
    sent = tensor.to(mesh.device)
    broadcast_from_first(sent, mesh.groups.expt_dp if is_expert else mesh.groups.dp_cp)
    if sent is not tensor:
        tensor.copy_(sent)
