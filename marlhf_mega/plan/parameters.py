"""Names and shapes of all parameters of a rank, as the model factory creates them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from marlhf_mega.config.limits import padded_vocab_size
from marlhf_mega.config.model import Head, ModelConfig
from marlhf_mega.plan.layout import WorldLayout


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of one rank."""

    name: str
    shape: tuple[int, ...]
    is_expert: bool = False
    """Replicated on the ranks with the same experts only."""
    is_frozen: bool = False
    """Has no gradient: with adapters, all but these and a scalar head."""
    is_shared_embedding: bool = False
    """On the first and the last stage: its gradient is reduced in a bucket of its own."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_product(self) -> bool:
        """Whether FP8 applies to it: matrices inside layers, except routers and gates."""
        return "linear_" in self.name and len(self.shape) == 2 and ".lora." not in self.name


@cache
def chunk_parameters(
    model: ModelConfig, layout: WorldLayout, *, head: Head, stage: int, chunk: int
) -> tuple[Parameter, ...]:
    """List the parameters of one model chunk in the order of the factory's `named_parameters`.

    All ranks of a pipeline stage hold the same shapes: vocabularies are padded to equal shards and
    `parallel.tensor_size` divides every other width.

    Args:
        model: with its vocabulary size.
        layout: of the world.
        head: `language` for policy and reference, `scalar` for critic and reward model.
        stage: pipeline stage, from 0.
        chunk: chunk of the stage, from 0.
    """
    assert model.vocab_size is not None
    first = stage == 0 and chunk == 0
    last = stage == layout.pipeline - 1 and chunk == layout.chunks - 1
    rows = padded_vocab_size(model.vocab_size, layout.tensor) // layout.tensor
    tied = model.tied_embeddings and head == "language"
    found: list[Parameter] = []
    if first:
        found.append(
            Parameter(
                name="embedding.word_embeddings.weight",
                shape=(rows, model.hidden_size),
                is_shared_embedding=tied and layout.pipeline > 1,
            )
        )
    for layer in range(model.num_layers // (layout.pipeline * layout.chunks)):
        prefix = f"decoder.layers.{layer}."
        found += _layer(model, layout, prefix)
    if last:
        found.append(Parameter(name="decoder.final_layernorm.weight", shape=(model.hidden_size,)))
        if head == "scalar":
            found.append(Parameter(name="output_layer.weight", shape=(1, model.hidden_size)))
        elif not (tied and first):
            found.append(
                Parameter(
                    name="output_layer.weight",
                    shape=(rows, model.hidden_size),
                    is_shared_embedding=tied,
                )
            )
    if model.lora.is_on:
        return tuple(
            p
            if ".lora." in p.name or (p.name == "output_layer.weight" and head == "scalar")
            # Embeddings without a gradient have no buckets of their own.
            else replace(p, is_frozen=True)
            for p in found
        )
    return tuple(found)


def stage_parameters(
    model: ModelConfig, layout: WorldLayout, *, head: Head, stage: int
) -> list[tuple[Parameter, ...]]:
    """List the parameters of a rank of one pipeline stage, chunk by chunk."""
    return [
        chunk_parameters(model, layout, head=head, stage=stage, chunk=chunk)
        for chunk in range(layout.chunks)
    ]


def learning(chunks: list[tuple[Parameter, ...]]) -> list[tuple[Parameter, ...]]:
    """Return the parameters that have gradients, chunk by chunk."""
    return [tuple(p for p in chunk if not p.is_frozen) for chunk in chunks]


def count(chunks: list[tuple[Parameter, ...]]) -> int:
    """Return the number of a rank's parameters."""
    return sum(parameter.size for chunk in chunks for parameter in chunk)


def largest_stage(
    model: ModelConfig, layout: WorldLayout, head: Head, *, only_learning: bool = False
) -> int:
    """Return the number of parameters of a rank of the largest stage, or of those that learn."""
    stages = [stage_parameters(model, layout, head=head, stage=s) for s in range(layout.pipeline)]
    return max(count(learning(chunks) if only_learning else chunks) for chunks in stages)


def whole_model_size(model: ModelConfig, head: Head, *, only_learning: bool = False) -> int:
    """Return the number of parameters of the whole model, without padding of the vocabulary.

    With `only_learning`, of those that have gradients.
    """
    one = WorldLayout(
        tensor=1, pipeline=1, chunks=1, context=1, expert=1, data=1, sequence_parallel=False
    )
    (parameters,) = stage_parameters(model, one, head=head, stage=0)
    if only_learning and model.lora.is_on:
        return count(learning([parameters]))
    assert model.vocab_size is not None
    padding = padded_vocab_size(model.vocab_size, 1) - model.vocab_size
    tables = [p for p in parameters if p.shape == (model.vocab_size + padding, model.hidden_size)]
    tables = [p for p in tables if not p.name.startswith("decoder.")]
    return count([parameters]) - len(tables) * padding * model.hidden_size


def _layer(model: ModelConfig, layout: WorldLayout, prefix: str) -> Iterator[Parameter]:
    hidden, head, tensor = model.hidden_size, model.kv_channels, layout.tensor
    query = model.num_attention_heads * head
    qkv = (query + 2 * model.query_groups * head) // tensor

    def weight(name: str, *shape: int, is_expert: bool = False) -> Parameter:
        return Parameter(name=prefix + name, shape=shape, is_expert=is_expert)

    def adapter(projection: str, rows: int, columns: int) -> Iterator[Parameter]:
        if adapted := model.lora.adapted(projection):
            yield weight(f"{projection}.lora.a", len(adapted) * model.lora.size, columns)
            yield weight(f"{projection}.lora.b", rows, model.lora.size)

    yield weight("input_layernorm.weight", hidden)
    yield weight("self_attention.linear_proj.weight", hidden, query // tensor)
    if model.post_norms:
        yield weight("self_attention.linear_proj.post_norm.weight", hidden)
    yield from adapter("self_attention.linear_proj", hidden, query // tensor)
    yield weight("self_attention.linear_qkv.weight", qkv, hidden)
    if model.qkv_bias:
        yield weight("self_attention.linear_qkv.bias", qkv)
    yield from adapter("self_attention.linear_qkv", qkv, hidden)
    if model.qk_norm:
        yield weight("self_attention.q_layernorm.weight", head)
        yield weight("self_attention.k_layernorm.weight", head)
    yield weight("pre_mlp_layernorm.weight", hidden)
    if model.num_experts is None:
        ffn = model.ffn_hidden_size // tensor
        yield weight("mlp.linear_fc1.weight", 2 * ffn, hidden)
        yield from adapter("mlp.linear_fc1", 2 * ffn, hidden)
        yield weight("mlp.linear_fc2.weight", hidden, ffn)
        if model.post_norms:
            yield weight("mlp.linear_fc2.post_norm.weight", hidden)
        yield from adapter("mlp.linear_fc2", hidden, ffn)
        return
    yield weight("mlp.router.weight", model.num_experts, hidden)
    inner = model.expert_ffn_hidden_size or model.ffn_hidden_size
    for local in range(model.num_experts // layout.expert):
        name = f"mlp.experts.local_experts.{local}"
        yield weight(f"{name}.linear_fc1.weight", 2 * inner, hidden, is_expert=True)
        yield weight(f"{name}.linear_fc2.weight", hidden, inner, is_expert=True)
    if model.shared_expert_ffn_hidden_size is not None:
        shared = model.shared_expert_ffn_hidden_size // tensor
        yield weight("mlp.shared_experts.gate_weight", 1, hidden)
        yield weight("mlp.shared_experts.linear_fc1.weight", 2 * shared, hidden)
        yield weight("mlp.shared_experts.linear_fc2.weight", hidden, shared)
