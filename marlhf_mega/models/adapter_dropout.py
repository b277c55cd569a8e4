"""Dropout on the inputs of adapters (`model.lora.dropout`), which does not depend on the layout.

Whether an input is dropped is a draw of what names it, not of who computes it: the pass of the run,
the sequence by its content, the position in the sequence, the projection and the number of the
feature among those of all ranks. So every rank of any layout draws for the tokens and features that
it has, as often as it likes: layers that are recomputed in the backward pass drop the same again.

As in peft, inputs that are kept are multiplied by 1 / (1 - dropout), and only in passes that train
(`dropping`). Unlike there, the projections that are fused in one matrix drop the same inputs, and
equal sequences in one pass do.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.algorithm.counter_rng import fold
from marlhf_mega.config.lora import FUSED, LoraConfig
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.last_layer_pruning import LastLayerPruning
from marlhf_mega.models.packing import Packing

_STREAM = 5
"""Keeps these draws apart from others of the same step."""
_LANES = 4
"""Draws of 16 bits in one of 64."""
_STEPS = 1 << 16


def token_keys(batch: SequenceBatch, packing: Packing, seed: Tensor) -> Tensor:
    """Return an int64 key of each of this rank's tokens, [seq/cp * batch]; of padding any.

    Args:
        batch: the sequences.
        packing: how they lie in rows, and which tokens are this rank's.
        seed: of the pass.
    """
    positions = packing.positions
    lengths = torch.nn.functional.pad(batch.prompt_lengths + batch.response_lengths, (0, 1))
    numbers = torch.arange(len(lengths), device=positions.device)
    if batch.lengths is None:
        sequences = numbers[:-1, None].expand(-1, len(positions))
    else:  # the last may be padding of the row
        sizes = packing.ends.diff()
        sequences = numbers[: len(sizes)].repeat_interleave(sizes, output_size=len(positions))[None]
    missing = len(positions) - batch.tokens.shape[1]
    tokens = torch.nn.functional.pad(batch.tokens, (0, missing))
    words = fold(tokens, positions) * (positions < lengths[sequences])
    contents = torch.zeros_like(lengths).index_add_(0, sequences.flatten(), words.flatten())
    keys = fold(seed, contents[sequences], positions)
    if packing.share is not None:
        keys = keys[:, packing.share.indices]
    return keys.t().flatten()


def kept_inputs(keys: Tensor, projection: int, features: range, dropout: float) -> Tensor:
    """Draw which inputs of a projection are kept: bool [tokens, features].

    Args:
        keys: [tokens] int64.
        projection: its number in the model.
        features: which of its inputs, over all ranks.
        dropout: share that is not kept, in steps of 1/65536.
    """
    first = features.start // _LANES
    words = torch.arange(first, -(-features.stop // _LANES), device=keys.device)
    draws = fold(keys[:, None], projection, words).view(torch.int16)
    skipped = features.start - first * _LANES
    draws = draws[:, skipped : skipped + len(features)]
    return draws >= round(_dropped(dropout) * _STEPS) - _STEPS // 2


def _dropped(dropout: float) -> float:
    """Return the share that is really dropped: never none, never all."""
    return min(max(round(dropout * _STEPS), 1), _STEPS - 1) / _STEPS


class InputDropout:
    """What one adapter drops of its inputs, if the pass is one that trains.

    The keys of the tokens arrive with the layer's own arguments, so that a layer recomputed in the
    backward pass finds those of its microbatch.
    """

    def __init__(self, layer: Any, projection: str, lora: LoraConfig, features: range) -> None:
        """Install it in a layer.

        Args:
            layer: Megatron's, with the projection in it.
            projection: its name inside the layer.
            lora: with dropout.
            features: which of the projection's inputs, over all ranks, are this rank's.
        """
        self._number = int(layer.layer_number) * len(FUSED) + [*FUSED].index(projection)
        self._features, self._dropout = features, lora.dropout
        self.factor = 1 / (1 - _dropped(lora.dropout))
        """What the inputs that are kept are multiplied by."""
        is_pruned = isinstance(layer.self_attn_bda, LastLayerPruning)
        self._reads_wanted = is_pruned and projection.startswith("mlp.")
        self._keys: Tensor | None = None
        self._handles = (
            layer.register_forward_pre_hook(self._take, with_kwargs=True),
            layer.register_forward_hook(self._leave),
        )

    @property
    def is_on(self) -> bool:
        """Whether the layer is in a pass that trains."""
        return self._keys is not None

    def drop(self, hidden: Tensor, *, part: int = 0, parts: int = 1) -> Tensor:
        """Zero what is dropped; the caller multiplies what it computes by `factor`.

        Args:
            hidden: [seq, batch, features].
            part: which of the parts of the sequence this is.
            parts: how many ranks the sequence is cut among.
        """
        assert self._keys is not None
        keys = self._keys.chunk(parts)[part]
        kept = kept_inputs(keys, self._number, self._features, self._dropout)
        return torch.where(kept.view(hidden.shape), hidden, 0.0)

    def remove(self) -> None:
        """Take it out of the layer."""
        for handle in self._handles:
            handle.remove()

    def _take(self, layer: Any, arguments: Any, named: dict[str, Any]) -> None:
        packing: Packing | None = named.get("packed_seq_params")
        if packing is None or packing.dropout_keys is None:
            return
        self._keys = packing.dropout_keys
        if self._reads_wanted and packing.wanted is not None:
            self._keys = self._keys[packing.wanted]

    def _leave(self, *_: Any) -> None:
        self._keys = None


@contextmanager
def dropping(chunks: Sequence[Any], *keys: int) -> Iterator[None]:
    """Let adapters drop inputs inside a `with` block, if `model.lora.dropout` says so.

    Args:
        chunks: of a model that learns.
        keys: of the pass: seed, step and whatever tells it from others of the step.
    """
    models = [getattr(chunk, "module", chunk) for chunk in chunks]
    for model in models:
        model.dropout_seed = fold(*keys, _STREAM) if model.model.lora.dropout else None
    try:
        yield
    finally:
        for model in models:
            model.dropout_seed = None
