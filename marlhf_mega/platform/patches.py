"""Reversible replacements of attributes, applied to Megatron modules as they are imported."""

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

MEGATRON = "megatron.core"

_ABSENT = object()


class PatchSet:
    """Replacements that are applied together and taken back together.

    It is also an import hook: `on_import(patch_set, module)` runs right after a `megatron.core`
    module is executed, before any other module can bind a name out of it. A patch of a Megatron
    module therefore needs no second step after the import.
    """

    def __init__(self, on_import: Callable[["PatchSet", ModuleType], None]) -> None:
        self._on_import = on_import
        self._originals: list[tuple[object, str, object]] = []
        self.installed = False

    def install(self) -> None:
        """Watch for Megatron modules from now on and patch those that are imported already."""
        if self.installed:
            return
        self.installed = True
        sys.meta_path.insert(0, self)
        for name, module in list(sys.modules.items()):
            if _is_megatron(name) and isinstance(module, ModuleType):
                self._on_import(self, module)

    def uninstall(self) -> None:
        """Put every original back, newest first, and stop watching."""
        if not self.installed:
            return
        self.installed = False
        sys.meta_path.remove(self)
        while self._originals:
            owner, name, original = self._originals.pop()
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def replace(self, owner: object, name: str, value: object) -> None:
        """Set `owner.name`, remembering what the owner itself held (not what it inherits)."""
        self._originals.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a Megatron module with the finders behind this one and patch it once executed."""
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
            execute(module)
            # An uninstall may come between finding a module and executing it.
            if self.installed:
                self._on_import(self, module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _is_megatron(module_name: str) -> bool:
    return module_name == MEGATRON or module_name.startswith(MEGATRON + ".")
