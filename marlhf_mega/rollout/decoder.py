"""One stage chunk run token by token: the weights that train, around a cache of keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn import functional as F

from marlhf_mega.config.limits import round_up
from marlhf_mega.models.fp8 import configs_of
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.layers import SdpaAttention
from marlhf_mega.models.prepacked import prepacked_projections
from marlhf_mega.models.rope import rotation_angles
from marlhf_mega.rollout.cache import KeyValueCache
from marlhf_mega.rollout.layers import decoder_layer
from marlhf_mega.rollout.routing import RoutingRecord
from marlhf_mega.rollout.work import Prefill, Work

NOTHING = -1e30
"""The logit of a rank whose columns are all padding: of a share of zero, but finite."""


class ChunkDecoder:
    """Runs one model chunk on new tokens and keeps its keys and values."""

    def __init__(
        self, chunk: StageModel, *, num_slots: int, max_tokens: int, record_routing: bool = False
    ) -> None:
        """Allocate the cache and tabulate the rotations.

        Args:
            chunk: the model chunk.
            num_slots: sequences in flight.
            max_tokens: longest sequence.
            record_routing: write down which experts tokens go to; inside `recording` only.
        """
        config, model = chunk.config, chunk.model
        assert config.num_query_groups is not None
        assert config.kv_channels is not None
        self.chunk = chunk
        self.layers = [decoder_layer(layer, config) for layer in chunk.decoder.layers]
        attentions = [
            SdpaAttention(
                config,
                layer.layer_number,
                AttnMaskType.causal,
                softmax_scale=config.softmax_scale,
                softcap=model.attention_softcap,
                window=model.sliding_window,
                window_every=model.sliding_window_every,
            )
            for layer in chunk.decoder.layers
        ]
        # Room for the rows that only fill a matrix product up; see `_aligned`.
        sizes = (round_up(n, chunk.token_multiple) for n in (num_slots, max_tokens))
        num_slots, max_tokens = sizes
        groups = max(1, config.num_query_groups // config.tensor_model_parallel_size)
        device = chunk.rotary_speeds.device
        self.cache = KeyValueCache(
            attentions,
            shape=(num_slots, groups, max_tokens, config.kv_channels),
            dtype=config.params_dtype,
            device=device,
        )
        self.routing = None
        if record_routing:
            self.routing = RoutingRecord(chunk, num_slots=num_slots, max_tokens=max_tokens)
        angles = rotation_angles(chunk.rotary_speeds, torch.arange(max_tokens, device=device))
        angles = angles[:, None, None]
        self.cos, sin = (x.to(config.params_dtype) for x in (angles.cos(), angles.sin()))
        # Rotation adds minus the second half to the first, and the first to the second.
        first, second = sin.chunk(2, dim=-1)
        self.sin = torch.cat((-first, second), dim=-1)

    def run(self, work: Work, hidden: Tensor | None) -> Tensor:
        """Advance the chunk.

        Args:
            work: what is new.
            hidden: [seq, batch, hidden] from the chunk before; none on the first.

        Returns:
            [seq, batch, hidden] for the next chunk; on the last one the normed states from which
            the next tokens follow, [slots, hidden].
        """
        seq, batch = work.tokens.shape[1], len(work.tokens)
        work = _aligned(work, self.chunk.token_multiple)
        more = (work.tokens.shape[1] - seq, len(work.tokens) - batch)
        if hidden is None:
            hidden = self.chunk.embed(work.tokens)
        elif any(more):
            hidden = F.pad(hidden, (0, 0, 0, more[1], 0, more[0]))
        hidden = self._run_layers(work, hidden)
        if any(more):
            hidden = hidden[:seq, :batch]
        if not self.chunk.post_process:
            return hidden
        ends = hidden[work.lengths - 1, work.rows] if isinstance(work, Prefill) else hidden[0]
        last: Tensor = self.chunk.decoder.final_layernorm(ends)
        return last

    def _run_layers(self, work: Work, hidden: Tensor) -> Tensor:
        if isinstance(work, Prefill):
            positions = torch.arange(work.tokens.shape[1], device=hidden.device)[:, None]
        else:
            positions = work.positions[None]
        cos, sin = self.cos[positions], self.sin[positions]
        half = cos.shape[-1] // 2

        def rotate(heads: Tensor) -> Tensor:
            return torch.addcmul(heads * cos, heads.roll(half, -1), sin)

        masks = self.cache.masks(work)
        for index, layer in enumerate(self.layers):
            new = layer.query_key_value(hidden, rotate)
            context = self.cache.attend(index, new, work, masks[index])
            hidden = layer.add_mlp(layer.add_attention(hidden, context))
        if self.routing is not None:
            self.routing.store(work)
        return hidden

    def move_slot(self, source: int, target: int) -> None:
        """Copy what is remembered of a sequence to another slot."""
        self.cache.move_slot(source, target)
        if self.routing is not None:
            self.routing.move_slot(source, target)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits of this rank's real columns, [batch, vocab/tp] (at least one)."""
        shard, cap = self.chunk.vocab_shard, self.chunk.model.logits_softcap
        if shard.num_real == 0:
            return hidden.new_full((len(hidden), 1), NOTHING, dtype=torch.float32)
        padded, _ = self.chunk.output_layer(hidden, weight=self.chunk.head_weight())
        logits = padded[:, : shard.num_real].float()
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _aligned(work: Work, multiple: int) -> Work:
    """Fill up to the rows that FP8 products take: longer prompts, or tokens for free slots.

    Nothing reads what they leave in the cache: it lies behind the prompts' ends, or where the
    next prompt of the slot will be written.
    """
    batch, seq = work.tokens.shape
    if isinstance(work, Prefill):
        missing = -seq % multiple
        return replace(work, tokens=F.pad(work.tokens, (0, missing))) if missing else work
    missing = -batch % multiple
    if not missing:
        return work
    tokens = F.pad(work.tokens, (0, 0, 0, missing))
    return replace(work, tokens=tokens, positions=F.pad(work.positions, (0, missing)))


@contextmanager
def generating(chunks: list[StageModel]) -> Iterator[None]:
    """Evaluate without gradients and sequence parallelism, weights packed; then restore all.

    One new token a sequence cannot be shared along the sequence.
    """
    switched = [
        (module, name)
        for chunk in chunks
        for module in chunk.modules()
        for name in ("sequence_parallel", "reduce_scatter_embeddings")
        if getattr(module, name, False) is True
    ]
    configs = configs_of(chunks)
    sequence_parallel = chunks[0].config.sequence_parallel
    was_training = chunks[0].training
    try:
        for module, name in switched:
            setattr(module, name, False)
        for config in configs:
            config.sequence_parallel = False
        _make_quantizers_anew(chunks)
        for chunk in chunks:
            chunk.eval()
            # Transformer Engine must not use weights in FP8 that are older than the last update.
            chunk.set_is_first_microbatch()
        # Training could not use the weights in FP8 that inference mode leaves behind.
        no_gradients = torch.no_grad() if chunks[0].config.fp8 else torch.inference_mode()
        with no_gradients, prepacked_projections(chunks):
            yield
    finally:
        for module, name in switched:
            setattr(module, name, True)
        for config in configs:
            config.sequence_parallel = sequence_parallel
        _make_quantizers_anew(chunks)
        for chunk in chunks:
            chunk.train(was_training)


def _make_quantizers_anew(chunks: list[StageModel]) -> None:
    """Let Transformer Engine see whether ranks share the sequence: it asks only once.

    With quantizers of the other kind each rank would scale its share of a sequence on its own, and
    its peers would read it by their own scale. Those of delayed scaling hold its history; it
    generates without FP8.
    """
    if chunks[0].config.fp8_recipe == "delayed":
        return
    for module in (module for chunk in chunks for module in chunk.modules()):
        if hasattr(module, "fp8_meta_tensors_initialized"):
            module.fp8_initialized = module.fp8_meta_tensors_initialized = False
