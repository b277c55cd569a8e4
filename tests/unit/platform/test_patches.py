"""Modules are patched before other modules can bind names from them."""

import importlib
import sys
from contextlib import contextmanager

import pytest

from marlhf_mega.platform import patches


@pytest.fixture
def hook(tmp_path, monkeypatch):
    """A hook for a package of three modules; it adds 1 to their `value`."""
    package = tmp_path / "patched"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "early.py").write_text("value = 1")
    (package / "late.py").write_text("value = 2")
    (package / "importer.py").write_text("from patched.late import value as bound")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(patches, "MEGATRON", "patched")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))

    def add_one(module):
        if hasattr(module, "value"):
            module.value += 1

    yield patches.PatchOnImport(add_one)
    for name in [name for name in sys.modules if name.split(".")[0] == "patched"]:
        del sys.modules[name]


def test_modules_are_patched_whether_imported_before_or_after(hook):
    early = importlib.import_module("patched.early")
    hook.install()
    hook.install()
    assert early.value == 2
    assert importlib.import_module("patched.importer").bound == 3


def test_what_is_around_an_import_ends_with_it(hook, monkeypatch, tmp_path):
    (tmp_path / "patched" / "late.py").write_text("import sys\nvalue = sys.temporary")

    @contextmanager
    def around():
        with monkeypatch.context() as patch:
            patch.setattr(sys, "temporary", 5, raising=False)
            yield

    patches.PatchOnImport(lambda module: None, around=around).install()
    assert importlib.import_module("patched.importer").bound == 5
    assert not hasattr(sys, "temporary")
