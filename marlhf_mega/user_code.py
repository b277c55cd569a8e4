"""The user's own functions, named by the module or the file that they are in."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any


def load_function(source: str) -> Any:
    """Import `module:function`, or `path/to/file.py:function`, and return the function.

    A file may import what lies beside it.

    Raises:
        TypeError: what is there cannot be called.
        Exception: whatever the import raises.
    """
    place, _, name = source.rpartition(":")
    module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(f"{name} is {type(function).__name__}, not a function")
    return function


def _load_file(path: Path) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Last, so that it hides no other module.
    sys.path.append(str(path.parent))
    # Dataclasses and pickle look a class's module up there.
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
