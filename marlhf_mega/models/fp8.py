"""FP8 at work: weights that live in it, and switching it off in a model that is built."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


def exact_value(parameter: Tensor) -> Tensor:
    """Return the tensor to write first weights into.

    Transformer Engine keeps the exact first values of a parameter in FP8 beside it until the
    optimizer makes its masters of them; any other parameter is its own.
    """
    exact = getattr(parameter, "get_high_precision_init_val", lambda: None)()
    return parameter if exact is None else exact


@torch.no_grad()
def round_weights(chunks: Sequence[nn.Module]) -> None:
    """Bring weights in FP8 up to date after their exact values were written."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            exact = exact_value(parameter)
            if exact is not parameter:
                parameter.copy_(exact)


def switch_off(chunks: Sequence[nn.Module]) -> None:
    """Compute in the parameters' own dtype from now on; nothing to do without FP8."""
    for config in _configs(chunks):
        config.fp8 = None


@contextmanager
def without_fp8(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Compute in the parameters' own dtype for a while, backward passes included."""
    before = [(config, config.fp8) for config in _configs(chunks)]
    switch_off(chunks)
    try:
        yield
    finally:
        for config, number_format in before:
            config.fp8 = number_format


def _configs(chunks: Sequence[nn.Module]) -> list[TransformerConfig]:
    """Return the transformer configs of all modules, each once; Megatron reads them in passing."""
    found = {
        id(config): config
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(config := getattr(module, "config", None), TransformerConfig)
    }
    return list(found.values())
