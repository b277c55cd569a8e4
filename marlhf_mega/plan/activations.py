"""Bytes that forward and backward passes need, from what each operator saves.

There are three families of layers: ours on CPUs, ours on GPUs (Gemma-2, or no Transformer Engine)
and those of Transformer Engine, which fuses norms into the following matrix product. A test checks
the first against autograd and the allocator; the others are read from their source, not measured.
"""

from dataclasses import dataclass, replace

from marlhf_mega.config.limits import logits_chunk_tokens
from marlhf_mega.config.model import Head, ModelConfig
from marlhf_mega.config.sections.hardware import MemoryConfig
from marlhf_mega.plan.layout import WorldLayout
from marlhf_mega.plan.workload import MicrobatchShape, Role

_FLOAT32 = 4

SHORT_ATTENTION = 512
"""Longest sequence for which CPUs compute attention by batched matrix products."""


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Number formats and kernels, as far as they affect sizes."""

    element: int
    """Bytes of a weight or activation: 4 or 2."""
    has_engine: bool
    """Whether layers are those of Transformer Engine."""
    fp8: bool
    """Whether inputs of matrix products are saved in one byte."""
    on_cpu: bool = False
    """On CPUs norms and gated activations save less, products save the whole sequence, and short
    bfloat16 attention saves its scores."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of a layer on one rank for one microbatch."""

    model: ModelConfig
    layout: WorldLayout
    microbatch: MicrobatchShape
    formats: Formats
    only_selected: bool = False
    """Whether it is what follows the last attention, for the tokens of the head only."""

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
        """Elements of the keys; the values have as many."""
        groups = max(1, self.model.query_groups // self._tp)
        return self.tokens * groups * self.model.kv_channels

    @property
    def gathered(self) -> int:
        """Elements of gathered keys and values under context parallelism; 0 if they circulate."""
        circulates = self.formats.has_engine and self.model.sliding_window is None
        if self.layout.context == 1 or circulates:
            return 0
        return 2 * self.key * self.layout.context

    @property
    def masks(self) -> int:
        """Elements of the attention masks of this rank's pieces; padded sequences share them."""
        if not self.gathered:
            return 0
        count, microbatch = 2 * self.layout.context, self.microbatch
        pairs = microbatch.pairs if microbatch.packed is not None else microbatch.seq**2
        # Pieces r and count - 1 - r together attend to (count + 1) pieces of keys.
        return pairs * (count + 1) // count**2

    @property
    def selected(self) -> int:
        """Response tokens that the head gets on the rank with the most of them."""
        microbatch, count = self.microbatch, 2 * self.layout.context
        piece = microbatch.seq // count
        before = microbatch.seq - microbatch.response

        def responses(number: int) -> int:
            return max(0, (number + 1) * piece - max(number * piece, before))

        if count == 2:
            return microbatch.response_tokens
        most = max(responses(n) + responses(count - 1 - n) for n in range(count // 2))
        return -(-microbatch.filled_tokens * most // microbatch.seq)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.model.num_attention_heads // self._tp

    @property
    def scores(self) -> int:
        """Elements of the attention matrix, materialised for softcaps and `keeps_scores` only."""
        return self.microbatch.pairs * self.heads // self.layout.context

    @property
    def keeps_scores(self) -> bool:
        """Whether attention is by batched matrix products on a CPU, which save the scores."""
        seq, window = self.microbatch.seq, self.model.sliding_window
        whole = seq <= SHORT_ATTENTION and (window is None or window >= seq)
        whole = whole and self.layout.context == 1
        return self.formats.on_cpu and self.formats.element < _FLOAT32 and whole

    @property
    def _tp(self) -> int:
        return self.layout.tensor


def layer_shape(
    role: Role, layout: WorldLayout, microbatch: MicrobatchShape, formats: Formats
) -> LayerShape:
    """Return the sizes of a role's layers; Transformer Engine has no softcaps or post norms."""
    model = role.model
    engine = formats.has_engine and not model.post_norms and model.attention_softcap is None
    own = replace(formats, has_engine=engine, fp8=formats.fp8 and engine)
    return LayerShape(model=model, layout=layout, microbatch=microbatch, formats=own)


def layer_kept(shape: LayerShape, memory: MemoryConfig) -> int:
    """Return the bytes that one layer saves for its backward pass if it is not recomputed."""
    model, e = shape.model, shape.formats.element
    return (
        _normed_input(shape)
        + _post_norm(shape)
        + _attention_kept(shape, selective=memory.recompute == "selective")
        + (_head_norms(shape) if model.qk_norm else 0)
        + 4 * shape.microbatch.positions // shape.layout.context * (model.kv_channels * e)
        + _feed_forward_kept(shape)
        + _adapters_kept(shape)
    )


def _adapters_kept(shape: LayerShape) -> int:
    """Return the bytes of the small products between A and B, and of B over all outputs of A."""
    model, tensor, lora = shape.model, shape.layout.tensor, shape.model.lora
    query, key = model.num_attention_heads * model.kv_channels, model.query_groups
    rows = {
        "self_attention.linear_qkv": (query + 2 * key * model.kv_channels) // tensor,
        "self_attention.linear_proj": model.hidden_size,
        "mlp.linear_fc1": 2 * model.ffn_hidden_size // tensor,
        "mlp.linear_fc2": model.hidden_size,
    }
    kept = 0
    for projection, count in rows.items():
        if adapted := lora.adapted(projection):
            kept += len(adapted) * lora.size * (shape.tokens + count) * shape.formats.element
            kept += _dropout_kept(shape, projection) if lora.dropout else 0
    return kept


def _dropout_kept(shape: LayerShape, projection: str) -> int:
    """Return the bytes of the mask over an adapter's inputs, and of inputs that are kept twice."""
    match projection:
        case "self_attention.linear_proj":
            # Attention saves what it gave, and the adapter what is left of it.
            in_parts = shape.microbatch.packed is not None or shape.layout.context > 1
            saves = shape.formats.has_engine or not in_parts
            saves = saves and not shape.keeps_scores and shape.model.attention_softcap is None
            return shape.query * (1 + shape.formats.element * saves)
        case "mlp.linear_fc2":
            return shape.tokens * _ffn_width(shape)
        case _:
            return shape.residual


def chunk_kept(
    shape: LayerShape, memory: MemoryConfig, *, first: bool, last: bool, head: Head
) -> int:
    """Return the bytes that one chunk saves for one microbatch.

    Args:
        shape: sizes of its layers.
        memory: what is recomputed.
        first: whether it embeds tokens; others keep the activations they receive, as the input of
            their first layer or, if that layer works on a float32 copy, in addition to it.
        last: whether it has the final norm and the head; others keep what they send.
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
    """Return the sizes after the last attention, usually for the tokens of the head only."""
    shared = shape.layout.sequence_parallel or shape.model.num_experts
    return replace(shape, only_selected=not (shared or shape.formats.fp8))


def last_workspace(shape: LayerShape) -> int:
    """Return the bytes that the last chunk's backward pass needs besides saved activations."""
    layout = shape.layout
    if shape.model.num_layers > layout.pipeline * layout.chunks:
        return layer_workspace(shape)
    tail = tail_shape(shape)
    attention = layer_workspace(shape, behind=tail) - _feed_forward_kept(tail)
    return max(layer_workspace(tail), attention)


def layer_workspace(shape: LayerShape, *, behind: LayerShape | None = None) -> int:
    """Return the bytes that a layer's backward pass needs besides saved activations.

    These are gradients of the widest tensors, and that of the largest matrix before it is added to
    the gradient buffer.

    Args:
        shape: sizes of attention.
        behind: sizes of what follows attention. None means the same sizes.
    """
    e = shape.formats.element
    width, tokens = _ffn_width(shape), (behind or shape).tokens
    inner = (
        tokens
        * width
        * (2 if shape.model.num_experts is None else 2 * shape.model.experts_per_token)
    )
    matrix = 2 * width * shape.model.hidden_size
    gathered = shape.tokens * shape.model.hidden_size
    attention = shape.query + 2 * shape.key + 2 * shape.gathered
    if shape.model.attention_softcap is not None:
        attention += 3 * shape.scores
    return (max(inner, attention) + gathered + matrix) * e


def head_workspace(shape: LayerShape, head: Head, *, backward: bool, filtered: bool = False) -> int:
    """Return the bytes that log-probs need besides their inputs: one chunk of logits at a time.

    Args:
        shape: of the layer before it.
        head: language or scalar.
        backward: of a backward pass.
        filtered: log-probs over the tokens that top-k and top-p kept, and over all of them.
    """
    model, e = shape.model, shape.formats.element
    selected = shape.selected
    hidden = shape.tokens * model.hidden_size * e
    if head == "scalar":
        return hidden + selected * model.hidden_size * _FLOAT32
    columns = _columns(model, shape.layout)
    chunk = min(selected, logits_chunk_tokens(columns, on_cpu=shape.formats.on_cpu))
    logits = chunk * logits_bytes(model, shape.layout, filtered=filtered)
    if not backward:
        return hidden + logits
    # The gradient of the output matrix is summed over chunks in float32 and rounded once.
    matrix = columns * model.hidden_size * (_FLOAT32 + e)
    return hidden + selected * model.hidden_size * e + matrix + logits


def logits_bytes(model: ModelConfig, layout: WorldLayout, *, filtered: bool) -> int:
    """Return the bytes that the logits of a token need on a rank, and what is made of them."""
    copies = 4.0 if model.logits_softcap is not None else 2.0
    if filtered:  # the logits again, and the mask in bytes while it is made
        copies += 1.5
    return int(_columns(model, layout) * _FLOAT32 * copies)


def _columns(model: ModelConfig, layout: WorldLayout) -> int:
    assert model.vocab_size is not None
    return -(-model.vocab_size // layout.tensor)


def forward_workspace(shape: LayerShape) -> int:
    """Return the bytes that a layer needs in a pass without a backward pass."""
    e, width = shape.formats.element, _ffn_width(shape)
    residual = 3 * shape.residual + shape.tokens * shape.model.hidden_size
    factor = 1 if shape.model.num_experts is None else shape.model.experts_per_token
    feed_forward = 5 * shape.tokens * width * factor
    attention = 3 * shape.query + 3 * shape.key + 2 * shape.gathered
    if shape.model.attention_softcap is not None:
        attention += 2 * shape.scores + 2 * shape.query
    return (residual + max(feed_forward, attention)) * e


def in_flight(layout: WorldLayout, *, stage: int, num_microbatches: int) -> int:
    """Return how many microbatches' activations of one chunk a stage keeps at a time.

    In the 1F1B schedule a stage runs ahead by the number of stages after it; with several chunks,
    by the warm-up of the interleaved schedule.
    """
    ahead = layout.pipeline - stage - 1
    if layout.chunks > 1:
        ahead = 2 * ahead + (layout.chunks - 1) * layout.pipeline
    return min(ahead + 1, num_microbatches * layout.chunks)


def _feed_forward_kept(shape: LayerShape) -> int:
    norms = _normed_input(shape) + _post_norm(shape)
    if shape.model.num_experts:
        return norms + _experts_kept(shape)
    return norms + _gated_kept(shape, _ffn_width(shape))


def _ffn_width(shape: LayerShape) -> int:
    model = shape.model
    if model.num_experts is None:
        return model.ffn_hidden_size // shape.layout.tensor
    return model.expert_ffn_hidden_size or model.ffn_hidden_size


def _normed_input(shape: LayerShape, *, is_product_input: bool = True) -> int:
    """Input, root mean square and output of a norm, and its intermediate tensors."""
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
    return _normed_input(shape, is_product_input=False) if shape.model.post_norms else 0


def _attention_kept(shape: LayerShape, *, selective: bool) -> int:
    e = shape.formats.element
    projected = shape.query + 2 * shape.key
    rotated = shape.query + shape.key
    if shape.gathered and not selective:
        # Gathered copies of keys and values replace the rank's own.
        projected, rotated = shape.gathered + shape.masks, shape.query
    output = shape.query * (e + (1 if shape.formats.fp8 else 0))
    in_parts = shape.microbatch.packed is not None or shape.layout.context > 1
    if in_parts and not shape.formats.has_engine:
        output += shape.query * e  # outputs of the parts, and their concatenation
    if shape.keeps_scores and shape.model.attention_softcap is None:
        return (projected + rotated + (0 if selective else shape.scores)) * e + output
    if shape.model.attention_softcap is None:
        statistics = 0 if selective else shape.tokens * shape.heads * _FLOAT32
        return (projected + rotated) * e + output + statistics
    if selective:
        return (projected + rotated) * e + output
    # Queries, keys and values expanded to all heads, capped scores, probabilities.
    rounded = e if e < _FLOAT32 else 0
    masks = shape.microbatch.seq**2 if shape.microbatch.packed is None else shape.microbatch.pairs
    matrices = shape.scores * (e + _FLOAT32 + rounded) + masks
    return 3 * shape.query * e + matrices + output


def _head_norms(shape: LayerShape) -> int:
    """Norms of queries and keys in float32: input, output and one root per head."""
    e = shape.formats.element
    elements = shape.query + shape.key
    roots = elements // shape.model.kv_channels * _FLOAT32
    zero_centered = shape.model.zero_centered_norm
    if shape.formats.on_cpu and (e == _FLOAT32 or not zero_centered):
        return shape.query * e + roots  # keys are normalised in the output of the projection
    inside = _FLOAT32 if zero_centered else e
    return elements * (_FLOAT32 + inside) + roots


def _gated_kept(shape: LayerShape, width: int, tokens: int | None = None) -> int:
    """Gate and up projections and their product; unfused also the activated gate and a copy."""
    e = shape.formats.element
    product = 1 if shape.formats.fp8 else e
    kept = product + (2 if _is_fused(shape) else 4) * e
    return (shape.tokens if tokens is None else tokens) * width * kept


def _is_fused(shape: LayerShape) -> bool:
    return shape.model.activation == "silu"


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
