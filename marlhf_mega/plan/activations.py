"""Bytes that forward and backward passes hold, per token, by what each operator keeps.

Three families of layers: those of CPUs, our local ones on GPUs (Gemma-2, or no Transformer Engine)
and Transformer Engine's, which fuses norms into the matrix behind them. The CPU's are checked
against autograd and the allocator by a test; the others are read from their source, not measured.
"""

from dataclasses import dataclass, replace

from marlhf_mega.config.limits import logits_chunk_tokens
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import MemoryConfig
from marlhf_mega.plan.layout import Layout
from marlhf_mega.plan.parameters import Head
from marlhf_mega.plan.workload import Microbatch, Role

_FLOAT32 = 4

SHORT_ATTENTION = 512
"""Longest sequence of the CPU's attention by batched products."""


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Number formats that decide sizes."""

    element: int
    """Bytes of a weight or activation: 4 or 2."""
    has_engine: bool
    """Layers come from Transformer Engine."""
    fp8: bool
    """Inputs of matrix products are kept in one byte."""
    on_cpu: bool = False
    """Norms and gated activations keep less, products keep the whole sequence, short bfloat16
    attention keeps scores."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Widths on one rank of a layer that works on a microbatch."""

    model: ModelConfig
    layout: Layout
    microbatch: Microbatch
    formats: Formats
    only_selected: bool = False
    """Behind the last attention: the tokens are those that the head sees."""

    @property
    def tokens(self) -> int:
        """Tokens inside attention and feed-forward."""
        return (
            self.selected if self.only_selected else self.microbatch.tokens // self.layout.context
        )

    @property
    def residual(self) -> int:
        """Elements of the residual stream."""
        return self.tokens // self.layout.sequence_share * self.model.hidden_size

    @property
    def query(self) -> int:
        """Elements of the queries."""
        return self.tokens * self.model.num_attention_heads * self.model.kv_channels // self._tp

    @property
    def key(self) -> int:
        """Elements of the keys; as many values."""
        groups = max(1, self.model.query_groups // self._tp)
        return self.tokens * groups * self.model.kv_channels

    @property
    def gathered(self) -> int:
        """Elements of keys and values of all ranks that share sequences; the engine's travel."""
        travels = self.formats.has_engine and self.model.sliding_window is None
        if self.layout.context == 1 or travels:
            return 0
        return 2 * self.key * self.layout.context

    @property
    def masks(self) -> int:
        """Elements of the masks of this rank's pieces; rows of equal lengths have them together."""
        if not self.gathered:
            return 0
        count, microbatch = 2 * self.layout.context, self.microbatch
        pairs = microbatch.pairs if microbatch.packed is not None else microbatch.seq**2
        # Pieces r and count - 1 - r see (count + 1) pieces of keys together.
        return pairs * (count + 1) // count**2

    @property
    def selected(self) -> int:
        """Response tokens that the head sees on the rank with most of them."""
        microbatch, count = self.microbatch, 2 * self.layout.context
        piece = microbatch.seq // count
        before = microbatch.seq - microbatch.response

        def responses(number: int) -> int:
            return max(0, (number + 1) * piece - max(number * piece, before))

        if count == 2:
            return microbatch.response_tokens
        most = max(responses(n) + responses(count - 1 - n) for n in range(count // 2))
        return -(-microbatch.tokens * most // microbatch.seq)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.model.num_attention_heads // self._tp

    @property
    def scores(self) -> int:
        """Elements of the attention matrix, which only softcaps and `keeps_scores` need whole."""
        return self.microbatch.pairs * self.heads // self.layout.context

    @property
    def keeps_scores(self) -> bool:
        """Whether it is the CPU's attention by batched products."""
        seq, window = self.microbatch.seq, self.model.sliding_window
        whole = seq <= SHORT_ATTENTION and (window is None or window >= seq)
        whole = whole and self.layout.context == 1
        return self.formats.on_cpu and self.formats.element < _FLOAT32 and whole

    @property
    def _tp(self) -> int:
        return self.layout.tensor


def layer_shape(role: Role, layout: Layout, microbatch: Microbatch, formats: Formats) -> LayerShape:
    """Return the widths of a role's layers; softcaps and post norms rule the engine out."""
    model = role.model
    engine = formats.has_engine and not model.post_norms and model.attention_softcap is None
    own = replace(formats, has_engine=engine, fp8=formats.fp8 and engine)
    return LayerShape(model=model, layout=layout, microbatch=microbatch, formats=own)


def layer_kept(shape: LayerShape, memory: MemoryConfig) -> int:
    """Return the bytes that one layer keeps for its backward pass, if it is not recomputed."""
    model, e = shape.model, shape.formats.element
    return (
        _normed_input(shape)
        + (_post_norm(shape) if model.post_norms else 0)
        + _attention_kept(shape, selective=memory.recompute == "selective")
        + (_head_norms(shape) if model.qk_norm else 0)
        + 4 * shape.microbatch.positions // shape.layout.context * (model.kv_channels * e)
        + _feed_forward_kept(shape)
    )


def chunk_kept(
    shape: LayerShape, memory: MemoryConfig, *, first: bool, last: bool, head: Head
) -> int:
    """Return the bytes that one chunk keeps for one microbatch.

    Args:
        shape: of its layers.
        memory: what is recomputed.
        first: it embeds tokens; others keep what they were sent, as the first layer's input or,
            where that layer works on a copy in float32, beside it.
        last: it holds the final norm and the head; others keep what they send.
        head: of the model.
    """
    model, layout, e = shape.model, shape.layout, shape.formats.element
    layers = model.num_layers // (layout.pipeline * layout.chunks)
    again = 0
    if memory.recompute == "full":
        again = min(memory.recompute_num_layers or layers, layers)
    kept = again * shape.residual * e + (layers - again) * layer_kept(shape, memory)
    if first:
        kept += 8 * shape.tokens
    elif not again and e < _FLOAT32 and not shape.formats.has_engine:
        kept += shape.residual * e
    if not last:
        return kept + shape.residual * e
    tail = tail_shape(shape)
    kept += _normed_input(tail, is_product_input=False)
    if again < layers:
        kept += _feed_forward_kept(tail) - _feed_forward_kept(shape)
    selected = shape.selected
    state = _FLOAT32 if head == "scalar" else e
    return kept + selected * (model.hidden_size * state + 32)


def tail_shape(shape: LayerShape) -> LayerShape:
    """Return the widths behind the last attention, which as a rule sees the head's tokens only."""
    shared = shape.layout.sequence_parallel or shape.model.num_experts
    return replace(shape, only_selected=not (shared or shape.formats.fp8))


def last_workspace(shape: LayerShape) -> int:
    """Return the bytes that the last chunk's backward passes hold beside what was kept."""
    layout = shape.layout
    if shape.model.num_layers > layout.pipeline * layout.chunks:
        return layer_workspace(shape)
    tail = tail_shape(shape)
    attention = layer_workspace(shape, behind=tail) - _feed_forward_kept(tail)
    return max(layer_workspace(tail), attention)


def layer_workspace(shape: LayerShape, *, behind: LayerShape | None = None) -> int:
    """Return the bytes that a layer's backward pass holds beside what was kept.

    The gradients of the widest tensors and of the largest matrix, before it is added to the buffer.

    Args:
        shape: of attention.
        behind: of what follows it; none: the same.
    """
    e = shape.formats.element
    width, tokens = _ffn_width(shape), (behind or shape).tokens
    inner = tokens * width * (2 if shape.model.num_experts is None else 2 * _top_k(shape))
    matrix = 2 * width * shape.model.hidden_size
    gathered = shape.tokens * shape.model.hidden_size
    attention = shape.query + 2 * shape.key + 2 * shape.gathered
    if shape.model.attention_softcap is not None:
        attention += 3 * shape.scores
    return (max(inner, attention) + gathered + matrix) * e


def head_workspace(shape: LayerShape, head: Head, *, backward: bool) -> int:
    """Return the bytes that log-probs hold beside their inputs: one chunk of logits at a time."""
    model, e = shape.model, shape.formats.element
    selected = shape.selected
    hidden = shape.tokens * model.hidden_size * e
    if head == "scalar":
        return hidden + selected * model.hidden_size * _FLOAT32
    assert model.vocab_size is not None
    columns = -(-model.vocab_size // shape.layout.tensor)
    rows = min(selected, logits_chunk_tokens(columns, on_cpu=shape.formats.on_cpu))
    capped = 2 if model.logits_softcap is not None else 0
    if not backward:
        return hidden + rows * columns * _FLOAT32 * (2 + capped)
    # The matrix's gradient is summed over the chunks in float32 and rounded once.
    matrix = columns * model.hidden_size * (_FLOAT32 + e)
    logits = rows * columns * _FLOAT32 * (2 + capped)
    return hidden + selected * model.hidden_size * e + matrix + logits


def forward_workspace(shape: LayerShape) -> int:
    """Return the bytes that a layer holds when nothing is kept for a backward pass."""
    e, width = shape.formats.element, _ffn_width(shape)
    residual = 3 * shape.residual + shape.tokens * shape.model.hidden_size
    factor = 1 if shape.model.num_experts is None else _top_k(shape)
    feed_forward = 5 * shape.tokens * width * factor
    attention = 3 * shape.query + 3 * shape.key + 2 * shape.gathered
    if shape.model.attention_softcap is not None:
        attention += 2 * shape.scores + 2 * shape.query
    return (residual + max(feed_forward, attention)) * e


def in_flight(layout: Layout, *, stage: int, num_microbatches: int) -> int:
    """Return for how many microbatches a stage keeps one chunk's activations at the same time.

    One forward, one backward in turn: the first stage runs ahead by the stages behind it; with
    several chunks by what the interleaved schedule warms up with.
    """
    ahead = layout.pipeline - stage - 1
    if layout.chunks > 1:
        ahead = 2 * ahead + (layout.chunks - 1) * layout.pipeline
    return min(ahead + 1, num_microbatches * layout.chunks)


def _feed_forward_kept(shape: LayerShape) -> int:
    inner = _experts_kept if shape.model.num_experts else _dense_kept
    norms = _normed_input(shape) + (_post_norm(shape) if shape.model.post_norms else 0)
    return norms + inner(shape)


def _dense_kept(shape: LayerShape) -> int:
    return _gated_kept(shape, _ffn_width(shape))


def _ffn_width(shape: LayerShape) -> int:
    model = shape.model
    if model.num_experts is None:
        return model.ffn_hidden_size // shape.layout.tensor
    return model.expert_ffn_hidden_size or model.ffn_hidden_size


def _top_k(shape: LayerShape) -> int:
    return shape.model.experts_per_token


def _normed_input(shape: LayerShape, *, is_product_input: bool = True) -> int:
    """Input, root mean square and output of a norm, and of the norm's two steps in between."""
    e, zero_centered = shape.formats.element, shape.model.zero_centered_norm
    root = shape.tokens // shape.layout.sequence_share * _FLOAT32
    output = (1 if shape.formats.fp8 else e) * shape.residual * is_product_input
    if shape.formats.on_cpu:
        output *= shape.layout.sequence_share
    if shape.formats.has_engine:
        return shape.residual * e + output + root
    if shape.formats.on_cpu and (e == _FLOAT32 or not zero_centered):
        return shape.residual * e + output + root
    inside = _FLOAT32 if zero_centered else e
    return shape.residual * (_FLOAT32 + inside) + output + root


def _post_norm(shape: LayerShape) -> int:
    return _normed_input(shape, is_product_input=False)


def _attention_kept(shape: LayerShape, *, selective: bool) -> int:
    e = shape.formats.element
    projected = shape.query + 2 * shape.key
    rotated = shape.query + shape.key
    if shape.gathered and not selective:
        # Copies of keys and values, so that nothing holds on to the rank's own.
        projected, rotated = shape.gathered + shape.masks, shape.query
    output = shape.query * (e + (1 if shape.formats.fp8 else 0))
    in_parts = shape.microbatch.packed is not None or shape.layout.context > 1
    if in_parts and not shape.formats.has_engine:
        output += shape.query * e  # each part's, and all in one row
    if shape.keeps_scores and shape.model.attention_softcap is None:
        return (projected + rotated + (0 if selective else shape.scores)) * e + output
    if shape.model.attention_softcap is None:
        statistics = 0 if selective else shape.tokens * shape.heads * _FLOAT32
        return (projected + rotated) * e + output + statistics
    if selective:
        return (projected + rotated) * e + output
    # Queries, keys and values with as many heads each, the squashed scores, the probabilities.
    rounded = e if e < _FLOAT32 else 0
    masks = shape.microbatch.seq**2 if shape.microbatch.packed is None else shape.microbatch.pairs
    matrices = shape.scores * (e + _FLOAT32 + rounded) + masks
    return 3 * shape.query * e + matrices + output


def _head_norms(shape: LayerShape) -> int:
    """Norms of queries and keys in float32: input and normalised, per head one root."""
    e = shape.formats.element
    elements = shape.query + shape.key
    roots = elements // shape.model.kv_channels * _FLOAT32
    zero_centered = shape.model.zero_centered_norm
    if shape.formats.on_cpu and (e == _FLOAT32 or not zero_centered):
        return shape.query * e + roots  # keys are normed where the projection left them
    inside = _FLOAT32 if zero_centered else e
    return elements * (_FLOAT32 + inside) + roots


def _gated_kept(shape: LayerShape, width: int, tokens: int | None = None) -> int:
    """Gate and up projections and their product; unfused the activated gate and up again."""
    e = shape.formats.element
    product = 1 if shape.formats.fp8 else e
    kept = product + (2 if _is_fused(shape) else 4) * e
    return (shape.tokens if tokens is None else tokens) * width * kept


def _is_fused(shape: LayerShape) -> bool:
    return shape.formats.on_cpu and shape.model.activation == "silu"


def _experts_kept(shape: LayerShape) -> int:
    """As many copies of each token as experts it goes to, if the load is even."""
    model, e = shape.model, shape.formats.element
    assert model.num_experts is not None
    tokens, top = shape.tokens // shape.layout.tensor, model.experts_per_token
    # Beside what a dense layer keeps: the weight and, unfused, the product before it is weighed.
    unweighed = 0 if _is_fused(shape) else _ffn_width(shape) * e
    per_copy = _gated_kept(shape, _ffn_width(shape), 1) + unweighed + _FLOAT32
    kept = tokens * top * (model.hidden_size * e + per_copy)
    kept += tokens * (3 * model.num_experts + 24 * top)
    if model.shared_expert_ffn_hidden_size is not None:
        width = model.shared_expert_ffn_hidden_size // shape.layout.tensor
        kept += _gated_kept(shape, width) + shape.residual * e
    return kept
