"""Patch Megatron modules as they are imported."""

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

MEGATRON = "megatron.core"


class PatchOnImport:
    """An import hook that calls `patch(module)` right after a `megatron.core` module is executed.

    No other module has bound a name from it by then, so patching the module itself is enough. What
    must be different already while a module is executed, `around()` changes and restores.
    """

    def __init__(
        self,
        patch: Callable[[ModuleType], None],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._patch, self._around = patch, around
        self.installed = False

    def install(self) -> None:
        """Patch the Megatron modules that are imported already, and all others from now on."""
        if self.installed:
            return
        self.installed = True
        sys.meta_path.insert(0, self)
        for name, module in list(sys.modules.items()):
            if _is_megatron(name) and isinstance(module, ModuleType):
                self._patch(module)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a Megatron module with the finders after this one; patch it once executed."""
        if not _is_megatron(fullname):
            return None
        spec = None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            with self._around():
                execute(module)
            self._patch(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _is_megatron(module_name: str) -> bool:
    return module_name == MEGATRON or module_name.startswith(MEGATRON + ".")
