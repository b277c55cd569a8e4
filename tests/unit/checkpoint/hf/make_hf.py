"""Write tiny random Hugging Face models of every family: `python make_hf.py FOLDER`.

Runs in a process of its own, because transformers must not meet the CPU stand-ins for CUDA.
"""

import sys
from pathlib import Path

import torch
import transformers

SHAPE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "llama2": ("Llama", {"num_key_value_heads": 8}),
    "llama3": ("Llama", {"num_key_value_heads": 2, "dtype": "bfloat16"}),
    "llama31": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE}),
    "llama32": ("Llama", {"num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True}),
    "code_llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral_window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2_tied": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 6}),
    "qwen3_tied": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 8}),
    "gemma7b": ("Gemma", {"num_key_value_heads": 8, "head_dim": 8}),
    "gemma2": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 6, "sliding_window": 8}),
    "mixtral": ("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        EXPERTS | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 40},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        EXPERTS | {"num_key_value_heads": 2, "head_dim": 6, "norm_topk_prob": True},
    ),
}
SCALAR_HEADS = ("llama31", "qwen2_tied", "gemma2", "mixtral", "qwen3_moe")


def make(folder: Path, prefix: str, options: dict[str, object], *, scalar: bool) -> None:
    """Save one random model in several shards; norms and biases are random too."""
    labels = {"num_labels": 1, "pad_token_id": 0} if scalar else {}
    config = getattr(transformers, prefix + "Config")(**SHAPE | options | labels)
    suffix = "ForSequenceClassification" if scalar else "ForCausalLM"
    model = getattr(transformers, prefix + suffix)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    model.to(getattr(torch, str(options.get("dtype", "float32"))))
    model.save_pretrained(folder, max_shard_size="30KB")


def main() -> None:
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    root = Path(sys.argv[1])
    for name, (prefix, options) in MODELS.items():
        make(root / name, prefix, options, scalar=False)
        if name in SCALAR_HEADS:
            make(root / f"{name}_reward", prefix, options, scalar=True)


if __name__ == "__main__":
    main()
