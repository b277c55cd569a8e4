"""Floating-point operations of a model, from its shape, and their share of a device's peak.

The product of [m, k] and [k, n] takes 2 m k n operations. Norms, activations, softmax, rotary
embeddings and recomputation do not count: these are model FLOPs as in PaLM (arXiv 2204.02311),
appendix B, but attention counts only the causal half, at the sequences' actual lengths.
"""

from collections.abc import Sequence

from marlhf_mega.config.model import ModelConfig

PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "L40S": 362e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}
"""Part of a device's name -> dense bfloat16 operations per second (vendor data sheets)."""


def forward_flops(
    model: ModelConfig, lengths: Sequence[int], *, output_size: int, output_tokens: int
) -> float:
    """Return the operations of one forward pass over unpadded sequences.

    Generation with a KV cache takes the same operations, one position at a time.

    Args:
        model: the architecture.
        lengths: tokens of each sequence, prompt and response together.
        output_size: columns of the head: the vocabulary size, or 1 for a scalar head.
        output_tokens: tokens the head is applied to, over all sequences.
    """
    body = sum(lengths) * model.num_layers * _layer_flops_per_token(model)
    scores = 4 * model.num_attention_heads * model.kv_channels * _attended_pairs(model, lengths)
    return float(body + scores + 2 * model.hidden_size * output_size * output_tokens)


def training_flops(model: ModelConfig, forward: float) -> float:
    """Return the operations of forward and backward: backward has two products for each one.

    A weight that adapters leave frozen has one, for its input; the adapters' own do not count.
    """
    return (2 if model.lora.is_on else 3) * forward


def peak_flops(device_name: str) -> float | None:
    """Return a GPU's dense bfloat16 peak per second, None for an unknown device."""
    known = [name for name in PEAK_FLOPS if name in device_name]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def _layer_flops_per_token(model: ModelConfig) -> int:
    hidden, head = model.hidden_size, model.kv_channels
    query, key_value = model.num_attention_heads * head, 2 * model.query_groups * head
    attention = 2 * hidden * (query + key_value) + 2 * query * hidden
    if model.num_experts is None:
        return attention + 6 * hidden * model.ffn_hidden_size
    expert = model.expert_ffn_hidden_size or model.ffn_hidden_size
    feed_forward = 2 * hidden * model.num_experts + 6 * hidden * expert * model.experts_per_token
    if model.shared_expert_ffn_hidden_size:
        feed_forward += 6 * hidden * model.shared_expert_ffn_hidden_size + 2 * hidden
    return attention + feed_forward


def _attended_pairs(model: ModelConfig, lengths: Sequence[int]) -> int:
    """Count query-key pairs over all layers and sequences."""
    full = sum(length * (length + 1) // 2 for length in lengths)
    if model.sliding_window is None:
        return model.num_layers * full
    beyond = [max(length - model.sliding_window, 0) for length in lengths]
    sliding = full - sum(extra * (extra + 1) // 2 for extra in beyond)
    num_sliding = -(-model.num_layers // model.sliding_window_every)
    return num_sliding * sliding + (model.num_layers - num_sliding) * full
