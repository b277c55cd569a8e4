"""Which library computes what GPUs spend their time on, in one kernel or in several."""

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.sections.hardware import PrecisionConfig
from marlhf_mega.models.spec import (
    compute_dtype,
    engine_attends,
    fusions,
    uses_transformer_engine,
)
from marlhf_mega.parallel.mesh import Mesh

ENGINE = "Transformer Engine"
UNFUSED = "not fused"


def kernels_in_use(model: ModelConfig, precision: PrecisionConfig, mesh: Mesh) -> dict[str, str]:
    """Return who computes each operation of a layer that has fused kernels, or `not fused`."""
    fused, engine = fusions(model, mesh), uses_transformer_engine(model, mesh)
    attends = engine and engine_attends(model, mesh, compute_dtype(precision, mesh))
    backend = f"{ENGINE}, precision.attention_backend={precision.attention_backend}"
    return {
        "gradient accumulation": _by(
            ENGINE if engine else "NVIDIA's apex", fused["gradient_accumulation_fusion"]
        ),
        "rotation": _by(ENGINE, fused["apply_rope_fusion"]),
        # Two kernels, but they keep half as much for the backward pass.
        "activation": _by("platform/eager.py", fused["bias_activation_fusion"]),
        "attention": backend if attends else "torch",
    }


def _by(library: str, is_fused: bool) -> str:
    return library if is_fused else UNFUSED
