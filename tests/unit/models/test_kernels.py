"""Who computes what on a GPU, with and without Transformer Engine, by hand."""

from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.sections.hardware import PrecisionConfig
from marlhf_mega.models import spec
from marlhf_mega.models.kernels import kernels_in_use

ENGINE, OURS, NONE = "Transformer Engine", "platform/eager.py", "not fused"
CHOSEN = f"{ENGINE}, precision.attention_backend=flash"


@pytest.mark.parametrize(
    ("device", "engine", "apex", "ranks", "model", "wanted"),
    [
        ("cpu", False, False, 1, {}, [NONE, NONE, OURS, "torch"]),
        ("cpu", False, False, 1, {"activation": "gelu_tanh"}, [NONE, NONE, NONE, "torch"]),
        ("cuda", False, False, 1, {}, [NONE, NONE, OURS, "torch"]),
        ("cuda", False, True, 1, {}, ["NVIDIA's apex", NONE, OURS, "torch"]),
        ("cuda", True, False, 1, {}, [ENGINE, ENGINE, OURS, CHOSEN]),
        ("cuda", True, True, 1, {"lora": {"rank": 8}}, [NONE, ENGINE, OURS, CHOSEN]),
        # Its ring has no windows, and it has no softcaps.
        ("cuda", True, False, 2, {"sliding_window": 64}, [ENGINE, ENGINE, OURS, "torch"]),
        ("cuda", True, False, 1, {"attention_softcap": 50.0}, [NONE, NONE, OURS, "torch"]),
    ],
)
def test_what_is_fused_and_by_whom(monkeypatch, device, engine, apex, ranks, model, wanted):
    monkeypatch.setattr(spec.parallel_layers, "_grad_accum_fusion_available", apex)
    here = SimpleNamespace(name=device, transformer_engine=engine, default_dtype=torch.bfloat16)
    found = kernels_in_use(
        ModelConfig.model_validate(model),
        PrecisionConfig(attention_backend="flash"),
        SimpleNamespace(platform=here, cp_size=ranks),
    )
    operations = ["gradient accumulation", "rotation", "activation", "attention"]
    assert found == dict(zip(operations, wanted, strict=True))
