"""Counts what a GPU would launch, on the meta device, which has no values that a host could read."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WHOLE = {"rms_norm": 1, "scaled_dot_product_attention": 1, "logsumexp": 9}
"""Operators that are not taken apart here, and the kernels that each launches on a GPU."""
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "set_", "_unsafe_view"}


class Operators(TorchDispatchMode):
    """Counts kernels by the operator that launches them: not views, not memory without contents."""

    def __init__(self):
        super().__init__()
        self.launched = Counter()

    @property
    def total(self):
        return self.launched.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name not in WHOLE:
            # Inference mode hands over composed operators whole.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        if name not in FREE and not (func.is_view and is_alias(output, args)):
            self.launched[name] += launches(name, args, kwargs)
        return output


def launches(name, args, kwargs):
    number = WHOLE.get(name, 1)
    if name == "scaled_dot_product_attention" and (mask := args[3]) is not None:
        # Flags become numbers first: a fill and a choice. Kernels read rows that start at 16 bytes.
        number += 2 * (mask.dtype == torch.bool) + (mask.stride(0) % 8 != 0)
        # Its result lies query by query, and goes on head by head.
        number += args[0].shape[2] > 1
    if name == "cumsum" and kwargs.get("dtype") not in (None, args[0].dtype):
        number += 1
    return number


def is_alias(output, args):
    storages = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
    found = output if isinstance(output, list | tuple) else [output]
    return all(x.untyped_storage()._cdata in storages for x in found)
