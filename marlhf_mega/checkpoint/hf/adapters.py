"""Map every element of a sharded adapter to its place in the tensors that peft names."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

from marlhf_mega.checkpoint.hf.names import Entry, Kind
from marlhf_mega.checkpoint.hf.table import Piece, WeightTable
from marlhf_mega.config.lora import ATTENTION, FUSED
from marlhf_mega.models.lora import NAME

_SHAPES: dict[str, tuple[str, ...]] = {
    "q_proj": ("query", "hidden"),
    "k_proj": ("key", "hidden"),
    "v_proj": ("key", "hidden"),
    "o_proj": ("hidden", "query"),
    "gate_proj": ("ffn", "hidden"),
    "up_proj": ("ffn", "hidden"),
    "down_proj": ("hidden", "ffn"),
}
"""Outputs and inputs of each projection."""
_KINDS: dict[str, tuple[Kind, Kind]] = {
    "self_attention.linear_qkv": ("replicated", "qkv"),
    "self_attention.linear_proj": ("row_parallel", "replicated"),
    "mlp.linear_fc1": ("replicated", "gate_up"),
    "mlp.linear_fc2": ("row_parallel", "replicated"),
}
"""How tensor-parallel ranks share A and B."""


class AdapterTable(WeightTable):
    """The mapping of a model's adapters; names are those in the layers of the base model."""

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the adapters, in the model's order."""
        found: dict[str, tuple[int, ...]] = {}
        for layer in range(self.config.num_layers):
            for entry in self._layer_entries.values():
                named = self._named(entry, f"model.layers.{layer}.")
                found |= {n: shape for n, shape in named.items() if self._is_adapted(n)}
        return found

    @cached_property
    def _model_entries(self) -> dict[str, Entry]:
        return {}

    @cached_property
    def _layer_entries(self) -> dict[str, Entry]:
        found = {}
        for projection, fused in FUSED.items():
            if names := self.config.lora.adapted(projection):
                kind_a, kind_b = _KINDS[projection]
                rank: tuple[str, ...] = ("rank",)
                a = {f"{_path(n)}.lora_A.weight": rank + _SHAPES[n][1:] for n in names}
                # A row of an output without an adapter has zeros.
                b = {f"{_path(n)}.lora_B.weight": _SHAPES[n][:1] + rank for n in fused}
                found[f"{projection}.{NAME}.a"] = Entry(kind_a, a)
                found[f"{projection}.{NAME}.b"] = Entry(kind_b, b)
        return found

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return super()._sizes | {"rank": self.config.lora.size}

    def _pieces(
        self, kind: Kind, named: dict[str, tuple[int, ...]], rank: int, size: int, padded_vocab: int
    ) -> Iterator[Piece]:
        for piece in super()._pieces(kind, named, rank, size, padded_vocab):
            known = piece.name is not None and self._is_adapted(piece.name)
            yield piece if known else replace(piece, name=None)

    def _is_adapted(self, name: str) -> bool:
        return name.split(".")[-3] in self.config.lora.modules


def _path(name: str) -> str:
    return f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}"


def is_same_base(one: str | None, other: str | None) -> bool:
    """Whether two hashes are of the same frozen weights; a language head counts if both have it."""
    if one is None or other is None:
        return one == other
    return all(a == b for a, b in zip(one.split("-"), other.split("-"), strict=False))
