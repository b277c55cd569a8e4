"""Map every element of a sharded parameter to its place in a Hugging Face checkpoint.

`WeightTable.shard` turns an entry of the name table into the pieces that one rank holds. Import and
export use the same pieces. Nothing here communicates or reads a tensor.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from marlhf_mega.checkpoint.hf.names import EMBEDDING, Entry, Kind, layer_entries, model_entries
from marlhf_mega.config.hf_families import HfHead
from marlhf_mega.config.model import ModelConfig


@dataclass(frozen=True)
class Piece:
    """A range of one Hugging Face tensor."""

    name: str | None
    """The tensor; None means zeros that pad the vocabulary."""
    dim: int
    """Dim along which the tensor is sharded."""
    lo: int
    """First index of the range."""
    hi: int
    """One past the last index."""

    @property
    def size(self) -> int:
        """Number of indices."""
        return self.hi - self.lo


@dataclass(frozen=True)
class Shard:
    """One parameter of one rank: the concatenation of its pieces along their dim."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    is_first_replica: bool
    """Whether this rank is the first of the data-parallel ranks that hold the shard."""
    is_primary: bool
    """Whether this rank is the one that exports these elements."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The position of one rank in the mesh, and the size of the padded vocabulary."""

    padded_vocab_size: int
    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    """Rank in the tensor-parallel group of the experts."""
    etp_size: int = 1
    data_rank: int = 0
    """Rank among those that hold the same dense shards (data and context parallel)."""
    expert_data_rank: int = 0
    """Rank among those that hold the same expert shards."""


# Transformer Engine fuses a norm with the linear layer after it, and all experts into one module.
_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYER = re.compile(r"decoder\.layers\.\d+\.(.+)")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12]\.weight)")
_ENGINE_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12]\.weight)(\d+)")


@dataclass(frozen=True)
class WeightTable:
    """The mapping between Megatron-Core parameters and Hugging Face tensors of one model."""

    config: ModelConfig
    head: HfHead

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the Hugging Face checkpoint, in the model's order."""
        found: dict[str, tuple[int, ...]] = {}
        entries = self._model_entries
        found |= self._named(entries["embedding.word_embeddings.weight"])
        for layer in range(self.config.num_layers):
            for entry in self._layer_entries.values():
                is_expert = any("{e}" in name for name in entry.tensors)
                experts = range(self.config.num_experts or 0) if is_expert else (0,)
                for expert in experts:
                    found |= self._named(entry, f"model.layers.{layer}.", expert)
        found |= self._named(entries["decoder.final_layernorm.weight"])
        found |= self._named(entries["output_layer.weight"])
        return found

    def shard(self, name: str, layer: int | None, layout: Layout) -> Shard:
        """Describe the part of one parameter that a rank holds.

        Args:
            name: from `named_parameters` of a model chunk, of the local or Transformer Engine spec.
            layer: the layer's number in the whole model; None outside the layers.
            layout: the rank's position.

        Raises:
            RuntimeError: the parameter has no counterpart.
        """
        entry, prefix, local_expert = self._find(name, layer)
        rank, size = layout.tp_rank, layout.tp_size
        data_rank = layout.data_rank
        expert = 0
        if local_expert is not None:
            rank, size = layout.etp_rank, layout.etp_size
            data_rank = layout.expert_data_rank
            assert self.config.num_experts is not None
            expert = layout.ep_rank * (self.config.num_experts // layout.ep_size) + local_expert
        named = self._named(entry, prefix, expert)
        pieces = tuple(self._pieces(entry.kind, named, rank, size, layout.padded_vocab_size))
        first = next(iter(named.values()))
        dim = pieces[0].dim
        shape = (*first[:dim], sum(piece.size for piece in pieces), *first[dim + 1 :])
        is_copy = entry.kind == "replicated" and rank > 0
        # A tied output layer on the last pipeline stage is a copy of the first stage's embedding.
        is_copy |= name == "output_layer.weight" and entry is EMBEDDING
        is_first = data_rank == 0
        return Shard(shape, pieces, is_first, is_primary=is_first and not is_copy)

    @cached_property
    def _model_entries(self) -> dict[str, Entry]:
        return model_entries(self.config, self.head)

    @cached_property
    def _layer_entries(self) -> dict[str, Entry]:
        return layer_entries(self.config)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        config = self.config
        assert config.vocab_size is not None, "the vocabulary is known by now"
        return {
            "one": 1,
            "vocab": config.vocab_size,
            "hidden": config.hidden_size,
            "head": config.kv_channels,
            "query": config.num_attention_heads * config.kv_channels,
            "key": config.query_groups * config.kv_channels,
            "ffn": config.ffn_hidden_size,
            "experts": config.num_experts or 0,
            "expert_ffn": config.expert_ffn_hidden_size or config.ffn_hidden_size,
            "shared_ffn": config.shared_expert_ffn_hidden_size or 0,
        }

    def _find(self, name: str, layer: int | None) -> tuple[Entry, str, int | None]:
        """Return the entry, the prefix of its Hugging Face names and the local expert's number."""
        entries, key, prefix, expert = self._model_entries, name, "", None
        if match := _LAYER.fullmatch(name):
            assert layer is not None, name
            entries, prefix = self._layer_entries, f"model.layers.{layer}."
            key = _ENGINE_NAMES.get(match[1], match[1])
            if local := _LOCAL_EXPERT.fullmatch(key):
                key, expert = f"mlp.experts.{local[2]}", int(local[1])
            elif engine := _ENGINE_EXPERT.fullmatch(key):
                key, expert = f"mlp.experts.{engine[1]}", int(engine[2])
        if key not in entries:
            raise RuntimeError(
                f"{name}: every parameter must have a Hugging Face counterpart; model.architecture="
                f"{self.config.architecture} has none for this one. Change the architecture."
            )
        return entries[key], prefix, expert

    def _named(self, entry: Entry, prefix: str = "", expert: int = 0) -> dict[str, tuple[int, ...]]:
        return {
            prefix + name.replace("{e}", str(expert)): tuple(self._sizes[s] for s in shape)
            for name, shape in entry.tensors.items()
        }

    def _pieces(
        self, kind: Kind, named: dict[str, tuple[int, ...]], rank: int, size: int, padded_vocab: int
    ) -> Iterator[Piece]:
        (first, shape), *_ = named.items()
        match kind:
            case "replicated":
                for name, full in named.items():
                    yield Piece(name, 0, 0, full[0])
            case "vocab":
                lo, hi = _share(padded_vocab, rank, size)
                yield from _clip([Piece(first, 0, 0, shape[0])], lo, hi)
                if hi > shape[0]:
                    yield Piece(None, 0, max(lo, shape[0]), hi)
            case "gate_up":
                for name in named:
                    yield Piece(name, 0, *_share(shape[0], rank, size))
            case "row_parallel":
                yield Piece(first, 1, *_share(shape[1], rank, size))
            case "qkv":
                weight_rows = sum(full[0] for full in named.values())
                yield from _clip(self._query_groups(list(named)), *_share(weight_rows, rank, size))

    def _query_groups(self, names: list[str]) -> Iterator[Piece]:
        """Yield the query heads, the key and the value of every group, in Megatron-Core's order."""
        width = self.config.kv_channels
        heads = self.config.num_attention_heads // self.config.query_groups
        for group in range(self.config.query_groups):
            for name, count in zip(names, (heads, 1, 1), strict=True):
                yield Piece(name, 0, group * count * width, (group + 1) * count * width)


def _share(total: int, rank: int, size: int) -> tuple[int, int]:
    assert total % size == 0, (total, size)
    return total // size * rank, total // size * (rank + 1)


def _clip(pieces: Iterator[Piece] | list[Piece], lo: int, hi: int) -> Iterator[Piece]:
    """Yield the range [lo, hi) of the concatenation of pieces."""
    start = 0
    for piece in pieces:
        left, right = max(lo, start), min(hi, start + piece.size)
        if left < right:
            shift = piece.lo - start
            yield Piece(piece.name, piece.dim, left + shift, right + shift)
        start += piece.size
