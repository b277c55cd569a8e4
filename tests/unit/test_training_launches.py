"""Training passes as a GPU runs them, on the meta device: the host waits nowhere, launches are few.

Reading a value of a tensor without values raises: `.item()`, `.tolist()`, `.cpu()`, a branch.
"""

from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import ParallelConfig, PrecisionConfig
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.forward import logprob_forward, value_forward
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.parallel.fake_mesh import fake_mesh
from marlhf_mega.platform import prepare

LENGTHS = [(50, 20), (30, 70), (8, 14)]
# Operators of a layer's forward and backward pass with Megatron's own layers, each norm and each
# sequence's attention taken apart, which are one or two kernels on a GPU.
BUDGETS = {"padded": 140, "packed": 140 + 3 * 23}


class Launches(TorchDispatchMode):
    """Counts operators that are neither views nor only memory."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and "empty" not in name and name not in ("_unsafe_view", "detach"):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def batch(kind):
    prompts, responses = ([[1] * pair[part] for pair in LENGTHS] for part in (0, 1))
    return SequenceBatch.create(
        prompts, responses, multiple=2, device=torch.device("cpu"), packed=kind == "packed"
    )


def on_meta(made):
    tensors = {f.name: getattr(made, f.name) for f in fields(made)}
    moved = {k: t.to("meta") for k, t in tensors.items() if isinstance(t, torch.Tensor)}
    return replace(made, **moved)


def launched(layers, made, mesh, head):
    model = ModelConfig(
        num_layers=layers,
        hidden_size=256,
        num_attention_heads=8,
        num_query_groups=4,
        ffn_hidden_size=512,
        vocab_size=1000,
    )
    (chunk,) = build_chunks(model, PrecisionConfig(), mesh, head=head)
    forward = logprob_forward if head == "language" else value_forward
    with Launches() as launches:
        forward(chunk, on_meta(made)).float().sum().backward()
    return launches.count


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the CPU's stand-in for CUDA")
@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("head", ["language", "scalar"])
def test_passes_launch_few_operators_and_never_wait(kind, head):
    prepare()
    made = batch(kind)
    parallel = ParallelConfig(tensor_size=2, sequence_parallel=True)
    with fake_mesh(parallel, rank=0, world_size=2) as mesh:
        on_gpu = replace(mesh, platform=replace(mesh.platform, name="cuda", backend="nccl"))
        few, more = (launched(layers, made, on_gpu, head) for layers in (2, 4))
    per_layer = (more.total() - few.total()) / 2
    assert per_layer <= BUDGETS[kind]
    # Embedding, rotation, final norm and head.
    assert few.total() - 2 * per_layer <= (100 if head == "scalar" else 250)
