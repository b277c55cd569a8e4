"""The platform record: what a CPU-only process is told, memory figures, seeds, refusals."""

import importlib
import random
import resource
import sys
from platform import libc_ver

import numpy
import pytest
import torch

from marlhf_mega.platform import current, prepare
from marlhf_mega.platform.device import (
    Support,
    _engine_imports,
    check_local_rank,
    fp8_support,
)

MIB = 2**20
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without CUDA")


@needs_cpu
def test_without_cuda_the_platform_is_gloo_in_float32():
    platform = current()
    assert platform.name == "cpu"
    assert platform.device == torch.device("cpu")
    assert platform.backend == "gloo"
    assert platform.default_dtype is torch.float32
    assert not platform.has_transformer_engine
    assert platform.supports_fp8() == Support(False, "there is no CUDA device")
    assert current() is platform


@needs_cpu
def test_memory_follows_an_allocation_and_its_peak_outlives_it():
    platform = current()
    platform.empty_cache()
    before = platform.memory_allocated()
    resettable = platform.reset_memory_peak()
    block = torch.ones(64 * MIB // 4)
    assert platform.memory_allocated() - before > 60 * MIB
    del block
    assert platform.memory_peak() - before > 60 * MIB
    if resettable:
        platform.empty_cache()
        platform.reset_memory_peak()
        assert platform.memory_peak() - before < 30 * MIB


@needs_cpu
@pytest.mark.skipif(libc_ver()[0] != "glibc", reason="only glibc is told to")
def test_memory_is_used_again_without_page_faults():
    platform = prepare()

    def page_faults(often):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(often):
            torch.ones(16 * MIB // 4)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    once = 16 * MIB // resource.getpagesize()
    assert page_faults(50) < 10 * once
    kept = platform.memory_allocated()
    platform.empty_cache()
    assert kept - platform.memory_allocated() > 8 * MIB


def test_seed_repeats_python_numpy_and_torch_draws():
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(()).item()

    platform = current()
    platform.seed(5)
    first = draw()
    platform.seed(6)
    other = draw()
    platform.seed(5)
    assert draw() == first
    assert all(x != y for x, y in zip(first, other, strict=True))


def test_seed_takes_64_bit_numbers():
    current().seed(2**63 + 1)


@pytest.mark.parametrize(
    ("capability", "has_engine", "recipe", "cuda", "reason"),
    [
        ((8, 0), True, "tensorwise", "12.9", "compute capability 8.0, tensorwise FP8 needs at l"),
        ((8, 9), True, "blockwise", "12.9", "compute capability 8.9, blockwise FP8 needs at le"),
        ((9, 0), True, "mxfp8", "12.9", "the GPU has compute capability 9.0, mxfp8 FP8 needs at"),
        ((12, 0), True, "mxfp8", "12.9", "compute capability 12.0, mxfp8 FP8 needs one below 1"),
        ((9, 0), True, "blockwise", "12.8", "torch was built for CUDA 12.8, blockwise FP8 needs"),
        ((9, 0), False, "tensorwise", "12.9", "transformer_engine cannot be imported"),
        ((8, 9), True, "delayed", "12.4", ""),
        ((9, 0), True, "blockwise", "13.0", ""),
        ((10, 0), True, "mxfp8", "12.8", ""),
    ],
)
def test_fp8_needs_a_capable_gpu_and_transformer_engine(
    capability, has_engine, recipe, cuda, reason
):
    support = fp8_support(capability, has_engine, recipe, cuda=cuda)
    assert reason in support.reason
    assert bool(support) == (reason == "")


def test_a_rank_without_a_gpu_of_its_own_is_refused():
    check_local_rank(1, 2)
    with pytest.raises(RuntimeError, match=r"LOCAL_RANK=2: must be below .* Start at most 2 ranks"):
        check_local_rank(2, 2)


@needs_cpu
@pytest.mark.parametrize("error", ["AssertionError", "OSError", "RuntimeError"])
def test_a_broken_transformer_engine_is_one_that_is_not_there(tmp_path, monkeypatch, error):
    """Megatron catches an ImportError and no other."""
    name = "transformer_engine"
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {error}('libcudnn.so: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)  # put back at the end
    del sys.modules[name]
    assert not _engine_imports.__wrapped__()
    with pytest.raises(ImportError):
        importlib.import_module(f"{name}.pytorch")
