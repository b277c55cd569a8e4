"""From the states at the ends of sequences to what the books get of their next tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from marlhf_mega.rollout.decoder import ChunkDecoder
from marlhf_mega.rollout.sampling import SamplingRule, sample_tokens

Drawn = tuple[Tensor, Tensor | None]
"""What `SlotGroup.record` takes: [3, slots] float64 of tokens, log-probs and log-probs before
filters, and [slots, width] of what the filters kept, or none."""


def draw(
    decoders: Sequence[ChunkDecoder],
    hidden: Sequence[Tensor],
    numbers: Tensor,
    rule: SamplingRule,
) -> Drawn:
    """Choose the next token of each slot. The host does not wait.

    Args:
        decoders: the last chunks of the policy, and of a second model if the rule asks it.
        hidden: [slots, hidden] of each.
        numbers: [slots] float64 in [0, 1).
        rule: how.
    """
    logits = [decoder.logits(h) for decoder, h in zip(decoders, hidden, strict=True)]
    found = sample_tokens(
        logits[0],
        numbers,
        rule=rule,
        shard=decoders[0].chunk.vocab_shard,
        second=logits[-1] if rule.has_second else None,
    )
    # One message carries all three: ids are exact in float64.
    columns = (found.tokens, found.logprobs, found.full_logprobs)
    return torch.stack([column.double() for column in columns]), found.kept
