"""Models on one frozen base: each has adapters and a scalar head of its own (arXiv 2403.10704).

The modules are a model's own, the memory of their frozen parameters is the policy's. So passes,
checkpoints and exports work as for any model, and adapters of one leave the others alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.sections.hardware import MemoryConfig, PrecisionConfig
from marlhf_mega.models.gpt import ScalarHead, StageModel, attach_adapters, build_chunks
from marlhf_mega.parallel.mesh import Mesh


def build_on_base(
    base: Sequence[StageModel],
    model: ModelConfig,
    precision: PrecisionConfig,
    mesh: Mesh,
    *,
    memory: MemoryConfig | None = None,
    frozen: bool = False,
) -> list[StageModel]:
    """Build this rank's chunks of a model with a scalar head; adapters and head are not yet filled.

    No memory is allocated for a second base, not even meanwhile.

    Args:
        base: this rank's chunks of the policy, filled and with adapters.
        model: its architecture, with adapters of any rank and targets.
        precision: number formats.
        mesh: this rank's mesh.
        memory: matters only to models that are trained.
        frozen: it will not learn.
    """
    with _without_memory():
        chunks = build_chunks(
            model, precision, mesh, head="scalar", memory=memory, frozen=frozen, adapters=False
        )
    for chunk, owner in zip(chunks, base, strict=True):
        theirs = dict(owner.named_parameters())
        for name, parameter in chunk.named_parameters():
            if not name.startswith("output_layer."):
                parameter.data = theirs[name].data
        # A language head has a second hash.
        chunk.base_digest = owner.base_digest and owner.base_digest.split("-")[0]
    attach_adapters(chunks, mesh)
    return [chunk.requires_grad_(False) for chunk in chunks] if frozen else chunks


def unshared_parameters(chunks: Sequence[nn.Module], base: Sequence[nn.Module]) -> list[Tensor]:
    """Return the parameters of a model whose memory is not that of another's."""
    shared = {p.untyped_storage()._cdata for chunk in base for p in chunk.parameters()}
    found = [p.data for chunk in chunks for p in chunk.parameters()]
    return [p for p in found if p.untyped_storage()._cdata not in shared]


@contextmanager
def _without_memory() -> Iterator[None]:
    """Free the memory of parameters as soon as their module is in another, except a scalar head."""

    def free(_: Any, __: str, module: Any) -> None:
        if module is not None and not isinstance(module, ScalarHead):
            for parameter in module.parameters():
                parameter.untyped_storage().resize_(0)

    handle = register_module_module_registration_hook(free)
    try:
        yield
    finally:
        handle.remove()
