"""Sizes that the code holds itself to, where the planner must count with the same ones."""

LOGITS_CHUNK_ELEMENTS = 1 << 24
"""Logits in flight on one rank: 64 MiB of float32 whatever the vocabulary is."""

CPU_LOGITS_CHUNK_ELEMENTS = 1 << 22
"""The same on a CPU: 16 MiB stay in the cache; the C library maps blocks of 32 anew each time."""

CPU_LOGITS_CHUNK_TOKENS = 128
"""So many tokens a CPU takes at once all the same: the matrix is read once for each chunk."""

PREFILL_TOKENS = 1 << 14
"""Prompt tokens in one prefill: bounds its activations whatever the batch is."""

MOVE_BUCKET_BYTES = 1 << 27
"""Memory that a rank spends on a move of weights besides the weights: buckets to send and to
receive, two of each, so that one round is packed while another travels."""


def padded_vocab_size(vocab_size: int, tensor_size: int) -> int:
    """Round up so that every rank's shard is a multiple of 16 rows (FP8 needs that)."""
    multiple = 16 * tensor_size
    return -(-vocab_size // multiple) * multiple


def logits_chunk_tokens(num_columns: int, *, on_cpu: bool) -> int:
    """Return for how many tokens a rank makes its `num_columns` logits at once."""
    tokens = max(16, LOGITS_CHUNK_ELEMENTS // num_columns)
    if on_cpu:
        cached = CPU_LOGITS_CHUNK_ELEMENTS // num_columns
        tokens = min(tokens, max(CPU_LOGITS_CHUNK_TOKENS, cached))
    return tokens


def context_multiple(context_size: int) -> int:
    """Return what the length of a sequence is a multiple of: two pieces for each of its ranks."""
    return 2 * context_size if context_size > 1 else 1
