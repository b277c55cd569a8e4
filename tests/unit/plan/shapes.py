"""Models and layouts that the planner's tests share."""

LLAMA_8B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "ffn_hidden_size": 14336,
    "vocab_size": 128256,
}
LLAMA_70B = LLAMA_8B | {
    "num_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "ffn_hidden_size": 28672,
    "max_positions": 8192,
}
GEMMA_2B = {
    "num_layers": 18,
    "hidden_size": 2048,
    "num_attention_heads": 8,
    "num_query_groups": 1,
    "head_dim": 256,
    "ffn_hidden_size": 16384,
    "vocab_size": 256000,
    "tied_embeddings": True,
}
GEMMA_7B = GEMMA_2B | {
    "num_layers": 28,
    "hidden_size": 3072,
    "num_attention_heads": 16,
    "num_query_groups": 16,
    "ffn_hidden_size": 24576,
}
GEMMA2_27B = GEMMA_2B | {
    "num_layers": 46,
    "hidden_size": 4608,
    "num_attention_heads": 32,
    "num_query_groups": 16,
    "head_dim": 128,
    "ffn_hidden_size": 36864,
    "post_norms": True,
    "attention_softcap": 50.0,
}
QWEN3_30B = {
    "num_layers": 48,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_query_groups": 4,
    "head_dim": 128,
    "ffn_hidden_size": 6144,
    "vocab_size": 151936,
    "qk_norm": True,
    "num_experts": 128,
    "experts_per_token": 8,
    "expert_ffn_hidden_size": 768,
}
QWEN2_7B = {
    "num_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_query_groups": 4,
    "ffn_hidden_size": 18944,
    "vocab_size": 152064,
    "qkv_bias": True,
}
