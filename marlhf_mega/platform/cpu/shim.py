"""Let Megatron-Core run without a CUDA device.

Megatron hard-codes CUDA in about 200 places that no configuration flag reaches. Instead of patching
`torch` for the whole process, every `megatron.core` module gets its own view of `torch` when it is
imported: a namespace with the same objects except those listed in `_torch_view` and `_cuda_view`.
The rest of the process (torch.compile, Hugging Face models, our own code) sees an unchanged
`torch`, `torch.cuda.is_available()` stays False everywhere, and our own code gets no slower.

Only `Tensor.type` and `Tensor.cuda` are patched globally, because methods belong to a class and not
to a module; and `torch.compile`, but only while Megatron modules are imported.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

import torch

from marlhf_mega.platform.cpu import collectives, functions, optimizer
from marlhf_mega.platform.patches import MEGATRON, PatchOnImport

_RNG_LOGGER = logging.getLogger(f"{MEGATRON}.tensor_parallel.random")
_CPU = torch.device("cpu")


def install() -> None:
    """Install the shim before the first `import megatron`. Does nothing where CUDA is available.

    Raises:
        RuntimeError: Megatron is already imported, or Transformer Engine is installed.
    """
    if _patches.installed or torch.cuda.is_available():
        return
    if MEGATRON in sys.modules:
        raise RuntimeError(
            f"platform.cpu={MEGATRON}: must be imported after the CPU shim is installed; it is "
            "imported already. Call marlhf_mega.platform.prepare() before anything that imports "
            "megatron."
        )
    engine = importlib.util.find_spec("transformer_engine")
    if engine is not None:
        raise RuntimeError(
            "platform.cpu=transformer_engine: must not be installed where there is no CUDA device, "
            f"because Megatron then calls its CUDA kernels; found at {engine.origin}. Uninstall "
            "transformer-engine here, or use an environment without it."
        )
    _patches.install()
    # Megatron's optimizers look for 'torch.cuda.FloatTensor' by name.
    torch.Tensor.type = tensor_type  # type: ignore[assignment, method-assign]
    # Tied embeddings across pipeline stages and checkpoint loading call it unconditionally.
    torch.Tensor.cuda = _tensor_cuda  # type: ignore[assignment, method-assign]
    _RNG_LOGGER.addFilter(_is_not_rng_warning)


def installed() -> bool:
    """Return whether the shim is active in this process."""
    return _patches.installed


def cuda_of_megatron() -> ModuleType:
    """Return what Megatron modules see as `torch.cuda`."""
    view: ModuleType = _torch.cuda
    return view


def _patch(module: ModuleType) -> None:
    """Patch one Megatron module that has just been executed."""
    names = vars(module)
    if names.get("torch") is torch:
        names["torch"] = _torch
    match module.__name__.removeprefix(MEGATRON + "."):
        case "utils":
            names["local_multi_tensor_l2_norm"] = functions.l2_norm
        case "models.common.embeddings.rope_utils":
            name = "_apply_rotary_pos_emb_bshd"
            names[name] = functions.rotate_halves(names[name])
        case "tensor_parallel.random":
            # The originals only queue the change until CUDA is initialised, so the tracker would
            # silently do nothing.
            names |= {"_get_cuda_rng_state": _get_rng_state, "_set_cuda_rng_state": _set_rng_state}
        case "distributed.param_and_grad_buffer":
            names["dist_all_gather_func"] = collectives.all_gather
            names["dist_reduce_scatter_func"] = collectives.reduce_scatter
            names["_coalescing_manager"] = collectives.coalescing_manager


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Leave alone what Megatron modules decorate with `torch.compile` while they are executed.

    Compiling small functions takes seconds at their first call on a CPU and gains nothing, and the
    decorator alone loads the compiler: a second at the start of every rank.
    """
    before = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before


def _as_it_is(function: Callable[..., Any] | None = None, **options: object) -> Any:
    return _as_it_is if function is None else function


def _namespace(module: ModuleType, **changes: object) -> ModuleType:
    """Return a copy of a module's namespace with some names changed.

    The copy is a real module with its own dictionary, so lookups are as fast as in the original.
    """
    view = ModuleType(module.__name__, module.__doc__)
    vars(view).update(vars(module))
    # Submodules that are imported later exist on the original only.
    vars(view).update(changes, __getattr__=lambda name: getattr(module, name))
    return view


def _torch_view() -> ModuleType:
    """Return torch as Megatron modules see it."""
    # Called with device="cuda" in schedules, optimizers, gradient clipping and checkpoint loading.
    factories = ("tensor", "zeros", "empty_like")
    return _namespace(
        torch,
        cuda=_cuda_view(),
        distributed=_namespace(
            torch.distributed,
            new_group=collectives.new_group,
            # Without a GPU, MoE passes split sizes as tensors; gloo requires lists.
            all_to_all_single=collectives.all_to_all_single,
        ),
        optim=_namespace(torch.optim, AdamW=optimizer.AdamW),
        **{name: _on_cpu(getattr(torch, name)) for name in factories},
    )


def _cuda_view() -> ModuleType:
    """Return torch.cuda as Megatron modules see it."""
    return _namespace(
        torch.cuda,
        # The device= of nearly every allocation.
        current_device=lambda: _CPU,
        # Called after each batched pipeline communication, and in a checkpoint save.
        synchronize=lambda device=None: None,
        # Gradient reduction and MoE dispatch order their work by streams.
        Stream=_Stream,
        current_stream=lambda device=None: _Stream(),
        # The RNG tracker seeds and saves "the CUDA generator", but CPU operators draw from the
        # CPU's. Hence model_parallel_cuda_manual_seed seeds torch's default generator here.
        get_rng_state=_get_rng_state,
        manual_seed=torch.default_generator.manual_seed,
    )


class _Event:
    """An event of a CPU's only stream: it is complete as soon as it is recorded."""

    def synchronize(self) -> None:
        pass


class _Stream:
    """A CPU's only stream, which runs synchronously: there is never anything to wait for."""

    def __init__(self, device: object = None, priority: int = 0) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self) -> _Event:
        return _Event()


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Wrap a tensor factory, so that device="cuda" means the CPU."""

    @wraps(factory)
    def build(*args: object, **kwargs: object) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return build


def _get_rng_state(
    device: object = None, clone: bool = False, graph_safe: bool = False
) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(
    new_state: torch.Tensor, device: object = None, graph_safe: bool = False
) -> None:
    torch.set_rng_state(new_state)


def _is_not_rng_warning(record: logging.LogRecord) -> bool:
    # The CPU's generator serves as the "CUDA" one, so it always changes inside the tracker's fork.
    return not record.getMessage().startswith("CPU RNG state changed")


class _TypeName(str):
    """The name of a CPU or meta tensor type, which also equals the name of the CUDA type.

    It prints and hashes unchanged, so code outside Megatron sees no difference.
    """

    def __eq__(self, other: object) -> bool:
        kind = self.removeprefix("torch.").removeprefix("meta.")
        return str.__eq__(self, other) or str.__eq__("torch.cuda." + kind, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


_original_type = torch.Tensor.type


def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> str | torch.Tensor:
    """Do what `Tensor.type` does, but return a name that also equals that of a CUDA type."""
    result = _original_type(self, *args, **kwargs)
    return _TypeName(result) if isinstance(result, str) else result


def _tensor_cuda(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return self


_torch = _torch_view()
_patches = PatchOnImport(_patch, around=_uncompiled)
