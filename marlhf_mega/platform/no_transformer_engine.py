"""Fixes for Megatron-Core where Transformer Engine is not installed, with or without a GPU."""

from types import ModuleType

from marlhf_mega.platform.patches import MEGATRON, PatchOnImport


def fill_gaps() -> None:
    """Fix what does not work in Megatron if Transformer Engine cannot be imported."""
    _patches.install()


def _patch(module: ModuleType) -> None:
    if module.__name__ == f"{MEGATRON}.transformer.moe.moe_utils":
        # 0.16.1 does not define the name if the import of Transformer Engine fails.
        vars(module).setdefault("te_general_gemm", None)


_patches = PatchOnImport(_patch)
