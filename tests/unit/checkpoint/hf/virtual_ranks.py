"""Ranks of any layout in one process: Megatron-Core's parameter names, and ranks as threads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from marlhf_mega.checkpoint.hf.parameters import LocalParameter
from marlhf_mega.checkpoint.hf.table import Layout


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Degrees of parallelism; `vpp` is the number of chunks per stage."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1

    @property
    def stage_size(self):
        return self.tp * self.dp


@dataclass(frozen=True)
class VirtualRank:
    layout: Layout
    names: list[tuple[str, int | None]]

    def parameters(self, table, fill=float("nan"), dtype=torch.float32):
        return [
            LocalParameter(
                name, layer, torch.full(table.shard(name, layer, self.layout).shape, fill).to(dtype)
            )
            for name, layer in self.names
        ]


def virtual_ranks(config, head, degrees, *, engine=False):
    """List every rank in Megatron-Core's order: tensor fastest, then data, then pipeline."""
    padded = -(-config.vocab_size // (8 * degrees.tp)) * 8 * degrees.tp
    ranks = []
    for stage in range(degrees.pp):
        names = _stage_names(config, head, degrees, stage, engine=engine)
        for n in range(degrees.stage_size):
            layout = Layout(
                padded_vocab_size=padded,
                tp_rank=n % degrees.tp,
                tp_size=degrees.tp,
                data_rank=n // degrees.tp,
                etp_rank=n % degrees.etp,
                etp_size=degrees.etp,
                ep_rank=n // degrees.etp % degrees.ep,
                ep_size=degrees.ep,
                expert_data_rank=n // (degrees.etp * degrees.ep),
            )
            ranks.append(VirtualRank(layout, names))
    return ranks


def _stage_names(config, head, degrees, stage, *, engine):
    chunk_size = config.num_layers // (degrees.pp * degrees.vpp)
    is_first, is_last = stage == 0, stage == degrees.pp - 1
    names = [("embedding.word_embeddings.weight", None)] if is_first else []
    for chunk in range(degrees.vpp):
        first_layer = (chunk * degrees.pp + stage) * chunk_size
        for local in range(chunk_size):
            prefix = f"decoder.layers.{local}."
            own = layer_names(config, engine=engine, num_experts=degrees.ep)
            names += [(prefix + name, first_layer + local) for name in own]
    if is_last:
        names.append(("decoder.final_layernorm.weight", None))
    shared = config.tied_embeddings and head == "causal_lm" and degrees.pp == 1
    if is_last and not shared:
        names.append(("output_layer.weight", None))
    return names


def layer_names(config, *, engine, num_experts):
    """Spell out a layer's parameters as the layer specs of Megatron-Core name them."""
    names = [
        "self_attention.linear_qkv.layer_norm_weight" if engine else "input_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
    ]
    names += ["self_attention.linear_qkv.bias"] * config.qkv_bias
    if config.qk_norm:
        names += ["self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"]
    if config.post_norms:
        names += ["self_attention.linear_proj.post_norm.weight", "mlp.linear_fc2.post_norm.weight"]
    if not config.num_experts:
        norm = "mlp.linear_fc1.layer_norm_weight" if engine else "pre_mlp_layernorm.weight"
        return [*names, norm, "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"]
    names += ["pre_mlp_layernorm.weight", "mlp.router.weight"]
    for i in range(config.num_experts // num_experts):
        for matrix in ("linear_fc1", "linear_fc2"):
            local = f"mlp.experts.local_experts.{i}.{matrix}.weight"
            names.append(f"mlp.experts.{matrix}.weight{i}" if engine else local)
    if config.shared_expert_ffn_hidden_size:
        names += [
            "mlp.shared_experts.linear_fc1.weight",
            "mlp.shared_experts.linear_fc2.weight",
            "mlp.shared_experts.gate_weight",
        ]
    return names


@dataclass
class _Room:
    size: int
    tensor_rooms: list = field(default_factory=list)
    """Those of the tensor-parallel groups, which are consecutive ranks."""
    barrier: threading.Barrier = field(init=False)
    values: list = field(init=False)

    def __post_init__(self):
        self.barrier = threading.Barrier(self.size, timeout=300)
        self.values = [None] * self.size

    def all_gather(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        result = list(self.values)
        self.barrier.wait()
        return result


@dataclass(frozen=True)
class ThreadPeers:
    """Ranks that are threads of one process."""

    rank: int
    room: _Room

    @property
    def size(self):
        return self.room.size

    @property
    def tensor_peers(self):
        rooms = self.room.tensor_rooms
        tp = self.size // len(rooms)
        return ThreadPeers(self.rank % tp, rooms[self.rank // tp])

    def agree(self, error):
        found = self.room.all_gather(self.rank, error)
        return next((error for error in found if error is not None), None)

    def list_all(self, value):
        return self.room.all_gather(self.rank, value)

    def send(self, values, sizes, *, to):
        assert len(values) == sizes[self.rank]
        found = self.room.all_gather(self.rank, values.clone())
        return found if self.rank == to else []


def run_together(size, function, tp=1):
    """Call `function(peers)` on every rank; returns results or raised errors, by rank."""
    room = _Room(size, [_Room(tp) for _ in range(size // tp)])
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(function, ThreadPeers(rank, room)) for rank in range(size)]
    return [future.exception() or future.result() for future in futures]
