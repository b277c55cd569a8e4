"""Sizes that both the run and the planner use."""

from collections.abc import Mapping

GIB = 2**30

LOGITS_CHUNK_ELEMENTS = 1 << 27
"""Logits that one rank computes at a time, whatever the vocabulary: 512 MiB in float32.

Each chunk reads the whole output matrix, and a GPU needs about a thousand tokens to multiply it at
full speed.
"""

CPU_LOGITS_CHUNK_ELEMENTS = 1 << 22
"""On a CPU: 16 MiB fit in the cache, and the C library reuses blocks below 32 MiB."""

CPU_LOGITS_CHUNK_TOKENS = 128
"""Fewest tokens of a chunk on a CPU, where they exceed the cache."""

PREFILL_TOKENS = 1 << 14
"""Prompt tokens in one prefill, which bounds its activations whatever the batch."""

SMALL_DATA_BYTES = 2**20
"""A data file below this size is tokenised into the memory of every rank, without a cache."""
READ_BLOCK_BYTES = 8 << 20
"""Largest buffer of a rank that reads a checkpoint, unless one row of a matrix is larger."""

MOVE_BUCKET_BYTES = 1 << 27
"""Memory for resharding on one rank besides the weights: two buckets to send and two to receive, so
that one round is packed while another is in flight."""

CACHE_PAGE_TOKENS = 128
"""Tokens in a page of an engine's key-value cache on CPUs; on GPUs they are fewer."""

WHOLE_TENSOR_BYTES = 1 << 29
"""Whole tensors that wait on a rank for an engine to load them, unless one tensor is larger."""


def round_up(value: int, multiple: int) -> int:
    """Round a count up to a multiple."""
    return -(-value // multiple) * multiple


def gpu_width(tokens: int, *, packed: bool, most: int | None = None) -> int:
    """Round the width of a row up to one of few: libraries plan their kernels for each on a GPU.

    Up to eight widths lie between a number and its double, padded up to four: packed rows are few
    and long, so that less is lost.

    Args:
        tokens: of the row, or of its longest sequence.
        packed: whether the row holds several sequences.
        most: a budget that is not exceeded; it is a width of its own.
    """
    least, steps = (512, 8) if packed else (64, 4)
    octave = 1 << (tokens - 1).bit_length()  # the power of two at or above
    width = round_up(tokens, max(least, octave // 2 // steps))
    return width if most is None else max(tokens, min(width, most))


def gpu_rows(count: int, *, most: int) -> int:
    """Round the rows of a padded batch up to one of few numbers: 1, 2, 3, 4, 6, 8, 12, 16, 24 ...

    Args:
        count: of sequences, or of groups that stay together.
        most: a number that is not exceeded; it is one of the few.
    """
    octave = power_of_two(count)
    return min(octave if 4 * count > 3 * octave else -(-3 * octave // 4), most)


def power_of_two(count: int, *, least: int = 1) -> int:
    """Round a count up to a power of two."""
    return max(least, 1 << (count - 1).bit_length())


def padded_vocab_size(vocab_size: int, tensor_size: int) -> int:
    """Pad so that every rank's shard is a multiple of 16 rows, which FP8 needs."""
    return round_up(vocab_size, 16 * tensor_size)


def paged_cache_bytes(*, layers: int, width: int, slots: int, tokens: int, element: int) -> int:
    """Return the bytes of a rank's key-value cache in pages, for sequences of the greatest length.

    Args:
        layers: of the rank.
        width: key heads of the rank times their size.
        slots: sequences.
        tokens: of the longest one.
        element: bytes of a number.
    """
    # One page more: an engine keeps one for itself.
    pages = slots * (round_up(tokens, CACHE_PAGE_TOKENS) // CACHE_PAGE_TOKENS) + 1
    return layers * 2 * width * pages * CACHE_PAGE_TOKENS * element


def replay_mask_row_bytes(*, top_k: int, vocab_size: int) -> int:
    """Return the bytes that say which tokens top-k and top-p kept at one position.

    They are ids with top-k, else one bit per token of the vocabulary.
    """
    return 4 * min(top_k, vocab_size) if top_k else -(-vocab_size // 8)


def expert_bytes(num_experts: int) -> int:
    """Return the bytes of a recorded choice among experts, or of none."""
    return 1 if num_experts < 256 else 2


def engine_candidates(top_k: int) -> int:
    """Return how many tokens of a position a vLLM engine is asked for: all that it has kept.

    It keeps those that tie with the k-th too, which in bfloat16 are a few.
    """
    return 2 * top_k + 8


def logits_chunk_tokens(num_columns: int, *, on_cpu: bool) -> int:
    """Return how many tokens a rank computes its `num_columns` logits for at a time."""
    tokens = max(16, LOGITS_CHUNK_ELEMENTS // num_columns)
    if on_cpu:
        cached = CPU_LOGITS_CHUNK_ELEMENTS // num_columns
        tokens = min(tokens, max(CPU_LOGITS_CHUNK_TOKENS, cached))
    return tokens


def describe_layout(sizes: Mapping[str, int], *, sequence_parallel: bool) -> str:
    """Return degrees of parallelism as text, such as `TP8 x PP4 x DP4 + SP`, without those of 1."""
    shown = [f"{axis}{n}" for axis, n in sizes.items() if n > 1 or axis in ("TP", "PP", "DP")]
    return " x ".join(shown) + (" + SP" if sequence_parallel else "")


def context_multiple(context_size: int) -> int:
    """Return what a sequence length must be a multiple of: two pieces per context-parallel rank."""
    return 2 * context_size if context_size > 1 else 1
