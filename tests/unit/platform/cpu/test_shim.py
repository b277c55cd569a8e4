"""The CPU shim: errors, what Megatron sees, what the rest of the process sees.

Importing Megatron under the shim cannot be undone, so each test runs its program in a new process.
"""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the shim is for CPU machines")


def run(program, *, python_path=""):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(python_path), *sys.path])),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def last_error_line(result):
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_an_earlier_megatron_import_is_refused():
    result = run(
        """
        import megatron.core
        from marlhf_mega.platform import prepare
        prepare()
        """
    )
    assert last_error_line(result) == (
        "RuntimeError: platform.cpu=megatron.core: must be imported after the CPU shim is "
        "installed; it is imported already. Call marlhf_mega.platform.prepare() before anything "
        "that imports megatron."
    )


def test_transformer_engine_on_a_machine_without_cuda_is_refused(tmp_path):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    result = run("from marlhf_mega.platform import prepare; prepare()", python_path=tmp_path)
    line = last_error_line(result)
    assert line.startswith("RuntimeError: platform.cpu=transformer_engine: must not be installed")
    assert str(package) in line
    assert "Uninstall transformer-engine" in line


def test_a_missing_psutil_is_named():
    result = run(
        """
        import sys
        sys.modules["psutil"] = None  # what Python itself keeps for a module that must not load
        from marlhf_mega.platform import prepare
        prepare()
        """
    )
    line = last_error_line(result)
    assert line.startswith("RuntimeError: platform.python=psutil: must be installed")
    assert "pip install psutil" in line


def test_megatron_computes_on_the_cpu_and_the_rest_of_the_process_sees_no_change():
    result = run(
        """
        import sys
        import torch
        from marlhf_mega.platform import prepare
        from marlhf_mega.platform.cpu import shim
        owners = (torch, torch.cuda, torch.distributed, torch.nn.Module)
        before = [dict(vars(owner)) for owner in owners]
        prepare(); prepare()
        assert shim.installed()
        for owner, names in zip(owners, before):
            assert all(vars(owner)[name] is value for name, value in names.items())

        from megatron.core.optimizer import clip_grads
        from megatron.core.transformer.moe import router  # 0.19 compiles a method of it
        assert torch.compile is before[0]["compile"] and "torch._dynamo" not in sys.modules
        seen = clip_grads.torch
        assert seen.zeros(2, device="cuda").device.type == "cpu"
        assert seen.tensor([1.0], device=seen.cuda.current_device()).device.type == "cpu"
        assert seen.Tensor is torch.Tensor and seen.nn is torch.nn
        assert not seen.cuda.is_available() and not torch.cuda.is_available()

        import torch.utils.benchmark  # a submodule that the view was made without
        assert seen.utils.benchmark is torch.utils.benchmark

        weight = torch.ones(2)
        assert weight.cuda() is weight
        assert weight.type() == "torch.cuda.FloatTensor" and weight.type() == "torch.FloatTensor"
        assert weight.bfloat16().type() in ["torch.cuda.HalfTensor", "torch.cuda.BFloat16Tensor"]
        assert weight.type() != "torch.cuda.HalfTensor" and weight.type() != "torch.HalfTensor"
        assert str(weight.type()) == "torch.FloatTensor"
        assert hash(weight.type()) == hash("torch.FloatTensor")
        assert weight.type(torch.float64).dtype is torch.float64
        """
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_torch_compile_still_works_under_the_shim():
    result = run(
        """
        import torch
        from marlhf_mega.platform import prepare
        prepare()
        import megatron.core.tensor_parallel

        @torch.compile
        def scaled(x):
            return (x * 2 + torch.zeros(3)).sin().type(torch.float64)

        x = torch.arange(3.0)
        torch.testing.assert_close(scaled(x), (x * 2).sin().double())
        """
    )
    assert result.returncode == 0, result.stderr
