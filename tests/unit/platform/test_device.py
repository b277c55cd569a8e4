"""The platform record: values on a CPU-only machine, memory figures, seeds, errors."""

import importlib
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from platform import libc_ver

import numpy
import pytest
import torch

from marlhf_mega.commands import doctor
from marlhf_mega.platform import Platform, current, device, prepare
from marlhf_mega.platform.device import (
    Support,
    _engine,
    check_local_rank,
    fp8_support,
)

MIB = 2**20
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without CUDA")


@needs_cpu
def test_without_cuda_the_platform_uses_gloo_and_float32():
    platform = current()
    assert platform.name == "cpu"
    assert platform.device == torch.device("cpu")
    assert platform.backend == "gloo"
    assert platform.default_dtype is torch.float32
    assert platform.transformer_engine == Support(False, "there is no CUDA device")
    assert not platform.has_broken_engine
    assert platform.supports_fp8() == Support(False, "there is no CUDA device")
    assert current() is platform


@needs_cpu
def test_a_machine_without_gpus_has_one_device_and_its_own_memory():
    line = Path("/proc/meminfo").read_text().splitlines()[0]
    assert current().num_devices == 1
    assert current().total_memory == pytest.approx(1024 * int(line.split()[1]), rel=0.01)


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
def test_freed_memory_is_reused_without_page_faults():
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


def test_the_seed_makes_python_numpy_and_torch_repeatable():
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
    ("capability", "engine", "recipe", "cuda", "reason"),
    [
        ((8, 0), True, "tensorwise", "12.9", "compute capability 8.0, tensorwise FP8 needs at l"),
        ((8, 9), True, "blockwise", "12.9", "compute capability 8.9, blockwise FP8 needs at le"),
        ((9, 0), True, "mxfp8", "12.9", "the GPU has compute capability 9.0, mxfp8 FP8 needs at"),
        ((12, 0), True, "mxfp8", "12.9", "compute capability 12.0, mxfp8 FP8 needs one below 1"),
        ((9, 0), True, "blockwise", "12.8", "torch was built for CUDA 12.8, blockwise FP8 needs"),
        ((9, 0), False, "tensorwise", "12.9", "Transformer Engine is not installed"),
        ((8, 9), True, "delayed", "12.4", ""),
        ((9, 0), True, "blockwise", "13.0", ""),
        ((10, 0), True, "mxfp8", "12.8", ""),
    ],
)
def test_fp8_needs_a_capable_gpu_and_transformer_engine(capability, engine, recipe, cuda, reason):
    support = fp8_support(capability, Support(engine, "not installed"), recipe, cuda=cuda)
    assert reason in support.reason
    assert bool(support) == (reason == "")


def test_a_rank_without_a_gpu_of_its_own_is_refused():
    check_local_rank(1, 2)
    with pytest.raises(RuntimeError, match=r"LOCAL_RANK=2: must be below .* Start at most 2 ranks"):
        check_local_rank(2, 2)


@needs_cpu
@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"__init__": "raise AssertionError('libcudnn.so: not found')"}, "libcudnn.so: not found"),
        ({"__init__": "raise OSError('libcudnn.so: not found')"}, "libcudnn.so: not found"),
        (
            {"__init__": "raise RuntimeError('built for torch 2.8\\nrebuild')"},
            "built for torch 2.8",
        ),
        # Megatron would put mocks in place of an engine without these names.
        ({"__init__": "", "pytorch": ""}, "No module named 'transformer_engine.pytorch.fp8'"),
        (
            {"__init__": "", "pytorch/__init__": "", "pytorch/fp8": "fp8_autocast = 1"},
            "FP8GlobalSt",
        ),
    ],
)
def test_a_broken_transformer_engine_is_told_from_a_missing_one(
    tmp_path, monkeypatch, caplog, files, reason
):
    name = "transformer_engine"
    for module, text in files.items():
        path = tmp_path / name / f"{module}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name, *(m for m in sys.modules if m.startswith(f"{name}."))]:
        monkeypatch.setitem(sys.modules, module, None)  # put back at the end
        del sys.modules[module]
    support = _engine.__wrapped__()
    assert not support
    assert support.reason.startswith("installed, but cannot be imported: ")
    assert reason in support.reason
    assert "rebuild" not in support.reason
    for module in (name, f"{name}.pytorch", f"{name}.pytorch.fp8"):
        with pytest.raises(ImportError):
            importlib.import_module(module)
    monkeypatch.setattr(device, "_engine", lambda: support)
    on_gpu = Platform("cuda", torch.device("cuda", 0), "nccl", torch.bfloat16)
    assert on_gpu.has_broken_engine
    monkeypatch.setattr(device, "current", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    prepare()
    assert f"Transformer Engine is {support.reason}" in caplog.text
    # The doctor's row, and of one that fits.
    assert doctor._engine(on_gpu).status == "FAIL"
    monkeypatch.setattr(device, "_engine", lambda: device._NOT_INSTALLED)
    assert not on_gpu.has_broken_engine
    assert doctor._engine(on_gpu).status == "note"


@pytest.mark.parametrize(
    ("installed", "status"),
    [("2.8.0", "FAIL"), ("2.9.0", "ok"), ("2.11.1", "ok"), ("2.12", "FAIL")],
)
def test_the_doctor_knows_the_engines_that_megatron_declares(monkeypatch, installed, status):
    declared = ["numpy", 'Transformer_Engine[pytorch]<2.12.0,>=2.9.0a0; extra == "dev"']
    monkeypatch.setattr(doctor, "requires", lambda package: declared)
    monkeypatch.setattr(doctor, "version", lambda package: installed)
    monkeypatch.setattr(device, "_engine", lambda: Support(True, ""))
    on_gpu = Platform("cuda", torch.device("cuda", 0), "nccl", torch.bfloat16)
    assert doctor._engine(on_gpu).status == status


PRODUCTS = """
from marlhf_mega import platform
here = platform.prepare()
import random, torch
from marlhf_mega.platform.cpu.matmul import matmul
rows, weight = torch.ones(1000, 256), torch.ones(256, 704)
shapes = random.Random(0).choices(range(100, 900), k=800)
matmul(rows, weight)
before = here.memory_allocated()
for shape in shapes:
    matmul(rows[:shape], weight)
print((here.memory_allocated() - before) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_products_of_many_shapes_take_no_memory_for_each():
    """Kept for every one of 500 shapes, they would take 320 MiB."""
    free = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS],
        env={k: v for k, v in os.environ.items() if k not in free}
        | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 180
