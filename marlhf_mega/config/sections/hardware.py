"""Layout over ranks, number formats and memory."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field

from marlhf_mega.config.section import Section, spell_off


class ParallelConfig(Section):
    """Degrees of parallelism. Data-parallel size = world / (TP x PP x CP)."""

    tensor_size: int = Field(1, gt=0)
    """Tensor parallelism (TP): ranks that share every weight matrix."""
    pipeline_size: int = Field(1, gt=0)
    """Pipeline parallelism (PP): stages that the layers are split into."""
    virtual_pipeline_size: int = Field(1, gt=0)
    """Chunks of layers per stage (interleaved schedule). 1 means the plain 1F1B schedule."""
    context_size: int = Field(1, gt=0)
    """Context parallelism (CP): ranks that share every sequence, for long sequences. During
    generation each of them is a replica of its own."""
    expert_size: int = Field(1, gt=0)
    """Expert parallelism (EP): ranks that the experts of a layer are distributed over."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    overlap: bool = False
    """Overlap gradient reduction and parameter gathering with computation. Of use with data
    parallelism."""

    @property
    def model_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return self.tensor_size * self.pipeline_size * self.context_size

    @property
    def generating(self) -> "ParallelConfig":
        """Degrees of the same ranks during generation, with the weights where they are.

        Without context parallelism: a sequence that grows token by token is not shared.
        """
        return self.model_copy(update={"context_size": 1})


class PrecisionConfig(Section):
    """Number formats. Master weights and optimizer state are always float32."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Format of weights and activations. `auto` means bfloat16 on GPUs and float32 on CPUs."""
    attention_backend: Literal["auto", "fused", "flash", "unfused"] = "auto"
    """Which attention kernel of Transformer Engine computes; they round differently. `auto` lets it
    choose. Use this key, not the NVTE_*_ATTN variables."""
    cpu_products: Literal["onednn", "torch", "auto"] = "onednn"
    """Library of large float32 matrix products on CPUs; they round differently. `auto` measures
    both at the first start, for each kind of product, and keeps the faster ones for the whole run,
    in `products.json` of its directory. Two such runs may differ in the last bits."""
    fp8: Annotated[Literal["off", "hybrid", "e4m3"], BeforeValidator(spell_off)] = "off"
    """Matrix products in FP8, by Transformer Engine. `hybrid` uses e5m2 for gradients and e4m3 for
    all else."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 scaling factors are computed. The default keeps no state between steps."""
    fp8_param_gather: bool = False
    """Keep and gather the weights of trained models in FP8. Only their master weights are exact."""
    fp8_edge_layers_bf16: int = Field(0, ge=0)
    """Number of first and of last layers that stay in bfloat16. Not available with `delayed`."""
    fp8_frozen: bool = False
    """Run the reference and the reward models in FP8 as well. Otherwise they run in `dtype`."""
    fp8_check_interval: int = Field(0, ge=0)
    """ppo: compare a microbatch with and without FP8 every so many steps. 0 means never."""
    fp8_max_logprob_gap: float = Field(0.1, gt=0)
    """Largest mean log-prob difference that such a check accepts, in nats per token."""
    fp8_min_cosine: float = Field(0.9, ge=-1, le=1)
    """Smallest cosine between the two gradients that such a check accepts."""
    fp8_on_divergence: Literal["warn", "leave"] = "warn"
    """What a failed check does: log a warning, or also leave FP8 for the rest of the run."""

    @property
    def fp8_alignment(self) -> int:
        """What rows and columns of FP8 matrix products must be a multiple of; 1 without FP8."""
        if self.fp8 == "off":
            return 1
        return 32 if self.fp8_recipe == "mxfp8" else 16

    def frozen(self) -> Self:
        """Return the formats of a model that is not trained."""
        fp8 = self.fp8 if self.fp8_frozen else "off"
        return self.model_copy(update={"fp8": fp8, "fp8_param_gather": False})


class MemoryConfig(Section):
    """Trades time for device memory. Results do not depend on it."""

    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass of trained models recomputes: nothing, the core of attention (pays off
    with softcaps, as fused kernels keep little), or whole layers."""
    recompute_num_layers: int | None = Field(None, gt=0)
    """`full`: layers to recompute in each chunk of a stage. None means all."""
    offload_idle: bool = False
    """ppo: move the reference, the reward models and the critic to host memory during phases that
    do not use them."""
    offload_optimizer: bool = False
    """ppo: keep master weights, Adam moments and gradients in host memory outside of updates."""
