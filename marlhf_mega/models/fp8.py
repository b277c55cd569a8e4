"""FP8 weights, and switching FP8 off in a model that is already built."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def exact_value(parameter: Tensor) -> Tensor:
    """Return the tensor to write initial weights into.

    Transformer Engine keeps the high-precision initial value of an FP8 parameter beside it until
    the optimizer copies it to its master weights; any other parameter is returned as it is.
    """
    exact = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    return parameter if exact is None else exact


@torch.no_grad()
def round_weights(chunks: Sequence[nn.Module]) -> None:
    """Quantise FP8 weights after their exact values were written."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            exact = exact_value(parameter)
            if exact is not parameter:
                parameter.copy_(exact)


def switch_off(chunks: Sequence[nn.Module]) -> None:
    """Compute in the parameters' own dtype from now on; does nothing without FP8."""
    for config in configs_of(chunks):
        config.fp8 = None


@contextmanager
def without_fp8(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Compute in the parameters' own dtype inside a `with` block, backward passes included."""
    before = [(config, config.fp8) for config in configs_of(chunks)]
    switch_off(chunks)
    try:
        yield
    finally:
        for config, number_format in before:
            config.fp8 = number_format


def configs_of(chunks: Sequence[nn.Module]) -> list[TransformerConfig]:
    """Return the transformer configs of all modules, each once; every forward pass reads them."""
    found = {
        id(config): config
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(config := getattr(module, "config", None), TransformerConfig)
    }
    return list(found.values())
