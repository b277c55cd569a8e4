"""Architecture of a language model: all that affects a parameter's shape or the forward pass."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from marlhf_mega.config.lora import LoraConfig
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


Head = Literal["language", "scalar"]
"""What a model ends in: logits over the vocabulary, or one number per token."""


class RopeScaling(Section):
    """Stretching of rotary frequencies for contexts longer than those of pre-training."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """`linear` divides every frequency by `factor`; `llama3` only the low ones, with a smooth
    transition."""
    factor: float = Field(1.0, ge=1.0)
    """New context length over the original one."""
    low_freq_factor: float = Field(1.0, gt=0)
    """`llama3`: frequencies whose wavelength exceeds original_max_positions / low_freq_factor are
    divided by `factor`."""
    high_freq_factor: float = Field(4.0, gt=0)
    """`llama3`: frequencies whose wavelength is below original_max_positions / high_freq_factor are
    kept."""
    original_max_positions: int = Field(8192, gt=0)
    """`llama3`: context length of the original pre-training."""


class ModelConfig(Section):
    """Architecture of a model and where its weights come from."""

    hf_path: Path | None = None
    """Hugging Face folder: its config.json decides every shape below, and its weights are loaded.
    None means that `init` decides."""
    init: str = "auto"
    """`auto` (weights of `hf_path` if set, else random), `random`, or a run directory."""

    architecture: Architecture = "llama"
    """Hugging Face architecture to import from and export to."""
    num_layers: int = Field(2, gt=0)
    """Transformer layers."""
    hidden_size: int = Field(128, gt=0)
    """Width of the residual stream."""
    num_attention_heads: int = Field(4, gt=0)
    """Query heads."""
    num_query_groups: int | None = Field(None, gt=0)
    """Key/value heads (grouped-query attention). None means as many as query heads."""
    head_dim: int | None = Field(None, gt=0)
    """Width of one head. None means hidden_size / num_attention_heads."""
    ffn_hidden_size: int = Field(352, gt=0)
    """Inner width of the gated feed-forward layer."""
    vocab_size: int | None = Field(None, gt=0)
    """Token ids that the embedding knows, before padding. None means the tokenizer's vocabulary."""
    max_positions: int = Field(2048, gt=0)
    """Longest sequence in tokens, prompt and response together."""
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
    """RMSNorm on each query and key head before the rotation (Qwen3)."""
    tied_embeddings: bool = False
    """The output layer shares the weight of the embedding."""
    zero_centered_norm: bool = False
    """Norms multiply by (1 + weight) (Gemma)."""
    embedding_scale: bool = False
    """Embeddings are multiplied by sqrt(hidden_size) (Gemma)."""
    post_norms: bool = False
    """Norms on the outputs of attention and of the feed-forward layer (Gemma-2)."""
    attention_softcap: float | None = Field(None, gt=0)
    """Attention scores become cap * tanh(score / cap) (Gemma-2). None means no cap."""
    logits_softcap: float | None = Field(None, gt=0)
    """Output logits become cap * tanh(logit / cap) (Gemma-2). None means no cap."""
    query_scale: float | None = Field(None, gt=0)
    """Attention scores are multiplied by query_scale**-0.5. None means head_dim."""
    sliding_window: int | None = Field(None, gt=0)
    """Positions that a token attends to, itself included. None means all."""
    sliding_window_every: int = Field(1, ge=1)
    """1: every layer has the window; 2: layers 0, 2, 4, ... have it (Gemma-2)."""

    num_experts: int | None = Field(None, gt=1)
    """Experts per layer. None means a dense model."""
    experts_per_token: int = Field(2, gt=0)
    """Experts that each token is routed to."""
    expert_ffn_hidden_size: int | None = Field(None, gt=0)
    """Inner width of one expert. None means ffn_hidden_size."""
    shared_expert_ffn_hidden_size: int | None = Field(None, gt=0)
    """Inner width of the shared expert, which processes every token, with a sigmoid gate
    (Qwen2-MoE). None means no shared expert."""
    router_softmax_first: bool = False
    """Softmax over all experts before the selection (Qwen, norm_topk_prob=false)."""
    router_aux_loss_coef: float = Field(0.0, ge=0)
    """Weight of the load-balancing loss. It is a mean over all tokens while the loss is one over
    response tokens, so prompts add to its weight."""

    init_std: float = Field(0.02, gt=0)
    """Standard deviation of random initial weights."""

    lora: LoraConfig = LoraConfig()
    """Low-rank adapters of the models that are trained."""

    @property
    def plain(self) -> Self:
        """The same model without adapters."""
        return self.adapted(LoraConfig())

    def adapted(self, lora: LoraConfig) -> Self:
        """Return the same model with these adapters."""
        return self.model_copy(update={"lora": lora})

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
