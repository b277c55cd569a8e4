"""Let Megatron-Core run where there is no CUDA device.

Megatron names CUDA in about 200 places that no configuration flag reaches. Instead of changing
`torch` for the whole process, every `megatron.core` module gets its own view of `torch` when it is
imported: a namespace with the same objects except those listed in `_torch_view` and `_cuda_view`.
The rest of the process (torch.compile, Hugging Face models, our own code) sees `torch` untouched,
`torch.cuda.is_available()` stays False everywhere, and nothing in a hot path of ours gets slower.

Only two changes are global, because methods belong to a class and not to a module:
`Tensor.type` and `Tensor.cuda`.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any

import torch

from marlhf_mega.platform import cpu_collectives, cpu_functions
from marlhf_mega.platform.patches import MEGATRON, PatchSet

_RNG_LOGGER = logging.getLogger(f"{MEGATRON}.tensor_parallel.random")
_CPU = torch.device("cpu")


def install() -> None:
    """Install the shim; call before the first `import megatron`. Does nothing where CUDA works.

    Raises:
        RuntimeError: Megatron was imported before, or Transformer Engine is installed.
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
    # Megatron's optimizers ask for 'torch.cuda.FloatTensor' by name.
    _patches.replace(torch.Tensor, "type", tensor_type)
    # Tied embeddings across pipeline stages and checkpoint exchange call it without asking.
    _patches.replace(torch.Tensor, "cuda", _tensor_cuda)
    _RNG_LOGGER.addFilter(_is_not_rng_warning)


def uninstall() -> None:
    """Put back every attribute that `install` or a later Megatron import replaced.

    Megatron modules stay imported; `install` then refuses until the process is started again.
    """
    _patches.uninstall()
    _RNG_LOGGER.removeFilter(_is_not_rng_warning)


def installed() -> bool:
    """Say whether the shim is active in this process."""
    return _patches.installed


def cuda_of_megatron() -> ModuleType:
    """Return what Megatron modules see as `torch.cuda`."""
    view: ModuleType = _torch.cuda
    return view


def _on_import(patches: PatchSet, module: ModuleType) -> None:
    """Patch one freshly executed Megatron module."""
    if vars(module).get("torch") is torch:
        patches.replace(module, "torch", _torch)
    match module.__name__.removeprefix(MEGATRON + "."):
        case "jit":
            # Compiling small functions costs seconds at their first call on a CPU and gains
            # nothing; modules bind this name when they are imported.
            patches.replace(module, "jit_fuser", module.noop_decorator)
        case "utils":
            patches.replace(module, "local_multi_tensor_l2_norm", cpu_functions.l2_norm)
        case "models.common.embeddings.rope_utils":
            name = "_apply_rotary_pos_emb_bshd"
            patches.replace(module, name, cpu_functions.in_halves(vars(module)[name]))
        case "fusions.fused_bias_swiglu":
            patches.replace(module, "swiglu", cpu_functions.swiglu)
            patches.replace(module, "swiglu_back", cpu_functions.swiglu_back)
        case "tensor_parallel.random":
            # The original only queues the change until CUDA starts, so the tracker would
            # silently do nothing.
            patches.replace(module, "_get_cuda_rng_state", _get_rng_state)
            patches.replace(module, "_set_cuda_rng_state", _set_rng_state)
        case "distributed.param_and_grad_buffer":
            patches.replace(module, "dist_all_gather_func", cpu_collectives.all_gather)
            patches.replace(module, "dist_reduce_scatter_func", cpu_collectives.reduce_scatter)
            patches.replace(module, "_coalescing_manager", cpu_collectives.coalescing_manager)


def _namespace(module: ModuleType, **changes: object) -> ModuleType:
    """Return a copy of a module's namespace with some names changed.

    The copy is a real module with its own dictionary, so a lookup costs the same as before.
    """
    view = ModuleType(module.__name__, module.__doc__)
    vars(view).update(vars(module))
    # Submodules that are imported later appear on the original only.
    vars(view).update(changes, __getattr__=lambda name: getattr(module, name))
    return view


def _torch_view() -> ModuleType:
    """Return torch as Megatron modules see it."""
    # Literals device="cuda" in schedules, optimizers, gradient clipping and checkpoint exchange.
    factories = ("tensor", "zeros", "empty_like")
    return _namespace(
        torch,
        cuda=_cuda_view(),
        distributed=_namespace(
            torch.distributed,
            new_group=cpu_collectives.new_group,
            # MoE hands tensors as split sizes unless they were on a GPU; gloo wants a list.
            all_to_all_single=cpu_collectives.all_to_all_single,
        ),
        **{name: _on_cpu(getattr(torch, name)) for name in factories},
    )


def _cuda_view() -> ModuleType:
    """Return torch.cuda as Megatron modules see it."""
    return _namespace(
        torch.cuda,
        # Given as device= to nearly every allocation.
        current_device=lambda: _CPU,
        # After each batched pipeline exchange, and in a checkpoint save.
        synchronize=lambda device=None: None,
        # Gradient reduction and MoE dispatch order their work by streams.
        Stream=_Stream,
        current_stream=lambda device=None: _Stream(),
        # The RNG tracker seeds and saves "the CUDA generator"; CPU operators draw from the CPU's.
        # So model_parallel_cuda_manual_seed also seeds torch's default generator here.
        get_rng_state=_get_rng_state,
        manual_seed=torch.default_generator.manual_seed,
    )


class _Event:
    """A point in the one order of execution there is on a CPU: it has been reached."""

    def synchronize(self) -> None:
        pass


class _Stream:
    """The one order of execution there is on a CPU: all waiting is over at once."""

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
    """Return a tensor factory that takes device="cuda" for the CPU."""

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
    # The "CUDA" generator is the CPU's here, so it always changes inside the tracker's fork.
    return not record.getMessage().startswith("CPU RNG state changed")


class _TypeName(str):
    """A CPU or meta tensor type's name that also equals the name of its CUDA twin.

    It prints and hashes as what it is, so code outside Megatron sees no difference.
    """

    def __eq__(self, other: object) -> bool:
        kind = self.removeprefix("torch.").removeprefix("meta.")
        return str.__eq__(self, other) or str.__eq__("torch.cuda." + kind, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


_original_type = torch.Tensor.type


def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> str | torch.Tensor:
    """Do what `Tensor.type` does, but give a name that passes for a CUDA tensor's."""
    result = _original_type(self, *args, **kwargs)
    return _TypeName(result) if isinstance(result, str) else result


def _tensor_cuda(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
    return self


_torch = _torch_view()
_patches = PatchSet(_on_import)
