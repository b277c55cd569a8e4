"""Stands in for Transformer Engine: its layers on a CPU, by torch, which refuse unknown arguments.

`names.json` has the argument names of several versions, the variable TE_VERSION chooses one. What
Megatron only imports is an empty class.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch.nn import functional as F

__version__ = os.environ["TE_VERSION"]
NAMES = json.loads(Path(__file__).parents[1].joinpath("names.json").read_text())[__version__]
attention_calls = []
"""(layout, mask, shape of the queries) of every call."""
grouped_calls = []
"""Rows of each expert, of every call."""


def check(method, given):
    unknown = set(given) - set(NAMES[method])
    assert not unknown or "**" in NAMES[method], f"{method} of {__version__} has no {unknown}"


def parameter(*shape, dtype, device):
    return torch.nn.Parameter(torch.empty(*shape, dtype=dtype, device=device))


class Product(torch.autograd.Function):
    """Adds the weight's gradient to its buffer, as the engine does where it is asked to."""

    @staticmethod
    def forward(ctx, inp, weight):
        ctx.save_for_backward(inp, weight)
        return F.linear(inp, weight)

    @staticmethod
    def backward(ctx, grad):
        inp, weight = ctx.saved_tensors
        weight.main_grad += grad.flatten(0, -2).T @ inp.flatten(0, -2)
        weight.grad_added_to_main_grad = True
        return grad @ weight, torch.full_like(weight, torch.nan)  # nobody may read it


def product(inp, weight, bias=None, *, fuses):
    if not (fuses and weight.requires_grad and torch.is_grad_enabled()):
        return F.linear(inp, weight, bias)
    output = Product.apply(inp, weight)
    return output if bias is None else output + bias


class Linear(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        check("Linear.__init__", options)
        self.fuses = options["fuse_wgrad_accumulation"]
        self.parallel_mode, self.tp_size = options["parallel_mode"], options["tp_size"]
        self.tp_group = options["tp_group"]
        self.sequence_parallel = self.tp_size > 1 and options["sequence_parallel"]
        shape = [options["out_features"], options["in_features"]]
        if self.parallel_mode:
            split = {"column": 0, "row": 1}[self.parallel_mode]
            shape[split] //= self.tp_size
        self.out_features, self.in_features = shape
        kind = {"dtype": options["params_dtype"], "device": options["device"]}
        self.weight = parameter(*shape, **kind)
        if self.parallel_mode:
            self.weight.tensor_model_parallel, self.weight.partition_dim = True, split
        self.use_bias = options["bias"]
        self.bias = parameter(shape[0], **kind) if self.use_bias else None

    def forward(self, inp, is_first_microbatch=None):
        return self.product(inp)

    def product(self, inp):
        from megatron.core import tensor_parallel as tp

        group = {"group": self.tp_group}
        if self.parallel_mode == "column" and self.tp_size > 1:
            gather = tp.gather_from_sequence_parallel_region
            copy = tp.copy_to_tensor_model_parallel_region
            inp = (gather if self.sequence_parallel else copy)(inp, **group)
        output = product(inp, self.weight, self.bias, fuses=self.fuses)
        if self.parallel_mode == "row" and self.tp_size > 1:
            scatter = tp.reduce_scatter_to_sequence_parallel_region
            total = tp.reduce_from_tensor_model_parallel_region
            output = (scatter if self.sequence_parallel else total)(output, **group)
        return output


class LayerNormLinear(Linear):
    def __init__(self, **options):
        check("LayerNormLinear.__init__", options)
        self_norm = {k: options.pop(k) for k in ("eps", "zero_centered_gamma")}
        assert options.pop("normalization") == "RMSNorm"
        assert not options.pop("return_layernorm_output", False)
        super().__init__(**options)
        self.eps, self.is_centered = self_norm.values()
        self.layer_norm_weight = parameter(
            options["in_features"], dtype=options["params_dtype"], device=options["device"]
        )
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, inp, is_first_microbatch=None):
        weight = self.layer_norm_weight + 1 if self.is_centered else self.layer_norm_weight
        return self.product(F.rms_norm(inp, weight.shape, weight, self.eps))


class GroupedLinear(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        check("GroupedLinear.__init__", options)
        assert not options["bias"]
        assert options["tp_size"] == 1
        self.num_gemms, self.fuses = options["num_gemms"], options["fuse_wgrad_accumulation"]
        self.use_bias = self.fp8 = self.fp8_calibration = False
        self.fp8_meta = {"fp8_checkpoint": False}
        shape = options["out_features"], options["in_features"]
        for number in range(self.num_gemms):
            weight = parameter(*shape, dtype=options["params_dtype"], device=options["device"])
            # However ranks share it.
            weight.tensor_model_parallel = True
            weight.partition_dim = int(options["parallel_mode"] == "row")
            self.register_parameter(f"weight{number}", weight)

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def forward(self, inp, m_splits, is_first_microbatch=None):
        grouped_calls.append(m_splits)
        parts = enumerate(inp.split(m_splits))
        return torch.cat(
            [product(x, getattr(self, f"weight{i}"), fuses=self.fuses) for i, x in parts]
        )


def apply_rotary_pos_emb(t, freqs, tensor_format, interleaved, fused):
    assert (tensor_format, interleaved, fused) == ("sbhd", False, True)
    assert freqs.dtype == torch.float32
    assert freqs.shape == (len(t), 1, 1, t.shape[-1])
    first, second = t.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (t.float() * freqs.cos() + turned * freqs.sin()).to(t.dtype)


def general_gemm(A, B, **options):  # noqa: N803 - the engine's names
    """Multiplies as cuBLAS does, which sees [rows, columns] as [columns, rows]."""
    check("general_gemm", options)
    assert options["bias"] is None
    product = {"TN": lambda: B @ A.T, "NN": lambda: B @ A, "NT": lambda: B.T @ A}
    return product[options["layout"]]().to(options["out_dtype"]), None, None, None


class RMSNorm(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        check("RMSNorm.__init__", options)
        size = options.get("normalized_shape") or options["hidden_size"]
        self.eps, self.is_centered = options["eps"], options["zero_centered_gamma"]
        self.weight = parameter(
            size, dtype=options.get("params_dtype"), device=options.get("device")
        )
        self.weight.sequence_parallel = options["sequence_parallel"]

    def forward(self, inp):
        weight = self.weight + 1 if self.is_centered else self.weight
        return F.rms_norm(inp, weight.shape, weight, self.eps)


class DotProductAttention(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        check("DotProductAttention.__init__", options)
        assert options["num_gqa_groups"] % options["tp_size"] == 0
        self.scale = options["softmax_scale"] or options["kv_channels"] ** -0.5

    def forward(self, query_layer, key_layer, value_layer, attention_mask=None, **options):
        check("DotProductAttention.forward", options)
        qkv = (query_layer, key_layer, value_layer)
        layout, mask = options.get("qkv_format", "sbhd"), options["attn_mask_type"]
        attention_calls.append((layout, mask, tuple(query_layer.shape)))
        if layout == "sbhd":
            assert mask == "causal"
            assert query_layer.dim() == 4
            return self.attend([x.permute(1, 2, 0, 3) for x in qkv]).permute(2, 0, 1, 3).flatten(2)
        assert layout == "thd"
        assert "padding" in mask
        assert query_layer.dim() == 3
        assert query_layer.dtype in (torch.bfloat16, torch.float16)
        ends = options["cu_seqlens_q"]
        assert ends.dtype == torch.int32
        assert int(ends[-1]) == len(query_layer)
        assert options["max_seqlen_q"] >= int(ends.diff().max())
        lengths = [length for length in ends.diff().tolist() if length]  # some may be empty
        parts = zip(*(x.split(lengths) for x in qkv), strict=True)
        rows = [self.attend([x.transpose(0, 1)[None] for x in part])[0] for part in parts]
        return torch.cat([row.transpose(0, 1).flatten(1) for row in rows])

    def attend(self, qkv):
        causal = {"is_causal": True, "scale": self.scale, "enable_gqa": True}
        return F.scaled_dot_product_attention(*qkv, **causal)


class HasAll(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Unused


class Unused(metaclass=HasAll):
    """Anything else that Megatron imports."""

    def __init__(self, *args, **options):
        raise NotImplementedError(type(self).__name__)


class CudaRNGStatesTracker:
    def reset(self):
        pass


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled():
        return False


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes every module of the package but its optimizers, which Megatron does without."""

    def find_spec(self, name, path=None, target=None):
        if not name.startswith(f"{__name__}.") or name.endswith(".optimizers"):
            return None
        if name in NAMES["lacks"]:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        pass


class Module(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__") or f"{self.__name__}.{name}" in NAMES["lacks"]:
            raise AttributeError(name)
        if name == "get_cpu_offload_context":
            return lambda *args, **options: (contextlib.nullcontext(), lambda x: x)
        found = globals().get(name) or type(name, (Unused,), {})
        setattr(self, name, found)
        return found


sys.meta_path.append(Finder())


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")
