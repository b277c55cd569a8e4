"""The language model that most rank scripts build: all it has can be split in four or in two."""

TINY = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 64,
    "vocab_size": 50,
    "init_std": 0.2,
}
