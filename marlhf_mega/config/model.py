"""What a language model looks like: every field that decides a parameter's shape or the forward."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from marlhf_mega.config.section import Section

Architecture = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
]


class RopeScaling(Section):
    """How rotary frequencies are stretched for long contexts."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """`linear` divides every frequency; `llama3` only the slow ones, with a smooth transition."""
    factor: float = Field(1.0, ge=1.0)
    """How much longer the new context is."""
    low_freq_factor: float = Field(1.0, gt=0)
    """`llama3`: wavelengths above original / low_freq_factor are divided by `factor`."""
    high_freq_factor: float = Field(4.0, gt=0)
    """`llama3`: wavelengths below original / high_freq_factor are kept."""
    original_max_positions: int = Field(8192, gt=0)
    """`llama3`: the context length of the first pre-training."""


class ModelConfig(Section):
    """Architecture and origin of a model. With `hf_path` its config.json supplies the shape."""

    hf_path: Path | None = None
    """A Hugging Face folder: its config.json decides every shape below, its weights are loaded."""
    init: str = "auto"
    """`auto` (weights of `hf_path` if set, else random), `random`, or a run directory."""

    architecture: Architecture = "llama"
    """Names the Hugging Face architecture that import and export speak."""
    num_layers: int = Field(2, gt=0)
    """Transformer layers."""
    hidden_size: int = Field(128, gt=0)
    """Width of the residual stream."""
    num_attention_heads: int = Field(4, gt=0)
    """Query heads."""
    num_query_groups: int | None = Field(None, gt=0)
    """Key/value heads (grouped-query attention); none: as many as query heads."""
    head_dim: int | None = Field(None, gt=0)
    """Width of one head; none: hidden_size / num_attention_heads."""
    ffn_hidden_size: int = Field(352, gt=0)
    """Inner width of the gated feed-forward layer."""
    vocab_size: int | None = Field(None, gt=0)
    """Rows of the embedding that mean something; none: the tokenizer's vocabulary."""
    max_positions: int = Field(2048, gt=0)
    """Longest sequence, prompt and response together."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of every RMSNorm."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Activation of the gate: SwiGLU or GeGLU."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling = RopeScaling()
    """Context extension of the rotary frequencies."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation (Qwen3)."""
    tied_embeddings: bool = False
    """The output layer shares the embedding's weight."""
    zero_centered_norm: bool = False
    """Norms multiply by (1 + weight) (Gemma)."""
    embedding_scale: bool = False
    """Embeddings are multiplied by sqrt(hidden_size) (Gemma)."""
    post_norms: bool = False
    """A norm on the output of attention and of the feed-forward layer (Gemma-2)."""
    attention_softcap: float | None = Field(None, gt=0)
    """Attention scores become cap * tanh(score / cap) (Gemma-2)."""
    logits_softcap: float | None = Field(None, gt=0)
    """Output logits become cap * tanh(logit / cap) (Gemma-2)."""
    query_scale: float | None = Field(None, gt=0)
    """Attention scores are multiplied by query_scale**-0.5; none: head_dim**-0.5."""
    sliding_window: int | None = Field(None, gt=0)
    """A token sees this many positions, itself included."""
    sliding_window_every: int = Field(1, ge=1)
    """1: every layer slides; 2: layers 0, 2, 4, ... slide and the others see all (Gemma-2)."""

    num_experts: int | None = Field(None, gt=1)
    """Experts per layer; none: a dense model."""
    experts_per_token: int = Field(2, gt=0)
    """Experts each token is sent to."""
    expert_ffn_hidden_size: int | None = Field(None, gt=0)
    """Inner width of one expert; none: ffn_hidden_size."""
    shared_expert_ffn_hidden_size: int | None = Field(None, gt=0)
    """Inner width of the expert that sees every token, with a sigmoid gate (Qwen2-MoE)."""
    router_softmax_first: bool = False
    """Probabilities over all experts before the choice (Qwen, norm_topk_prob=false)."""
    router_aux_loss_coef: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss, a mean over all tokens, in a loss over response tokens:
    prompts add to its weight."""

    init_std: float = Field(0.02, gt=0)
    """Standard deviation of random weights."""

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def kv_channels(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        heads, groups = self.num_attention_heads, self.query_groups
        if heads % groups:
            raise ValueError(
                f"model.num_query_groups={groups}: must divide model.num_attention_heads={heads}. "
                "Use a divisor."
            )
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"model.num_attention_heads={heads}: must divide model.hidden_size="
                f"{self.hidden_size} unless model.head_dim is set. Change one of them."
            )
        if self.num_experts and self.experts_per_token > self.num_experts:
            raise ValueError(
                f"model.experts_per_token={self.experts_per_token}: cannot exceed "
                f"model.num_experts={self.num_experts}. Lower it."
            )
        return self
