"""Weights moved to another layout and to the host as a GPU does it, on the meta device.

The host waits nowhere inside, or it would raise; a tensor takes one copy on each side of a move.
"""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.checkpoint.reshard import described
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import MemoryConfig, ParallelConfig, PrecisionConfig
from marlhf_mega.config.sections.training import OptimizerConfig
from marlhf_mega.models import offload
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.fake_mesh import fake_mesh
from marlhf_mega.parallel.resharder import Resharder
from marlhf_mega.platform import host_memory
from tests.operators import Operators

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="looks at the CPU's stand-in for CUDA"
)
RANKS = 2


@contextmanager
def model(layers, *, tensor_size, rank):
    """A rank's part of a model in bfloat16, and its mesh."""
    with fake_mesh(ParallelConfig(tensor_size=tensor_size), rank=rank, world_size=RANKS) as mesh:
        mesh = replace(mesh, platform=replace(mesh.platform, name="cuda"))
        shape = ModelConfig(
            num_layers=layers,
            hidden_size=64,
            num_attention_heads=8,
            num_query_groups=4,
            ffn_hidden_size=96,
            vocab_size=1000,
        )
        yield build_chunks(shape, PrecisionConfig(), mesh, head="language"), mesh


class Exchange:
    """A launch of which this rank knows what the others hold; messages arrive at once."""

    rank, size, device = 0, RANKS, torch.device("meta")

    def __init__(self, everyone):
        self.everyone, self.waits, self.messages = everyone, 0, 0

    def gather(self, _):
        return self.everyone

    def exchange(self, into, out, *, into_sizes, out_sizes):
        assert (len(into), len(out)) == (sum(into_sizes), sum(out_sizes))
        self.messages += 1
        return self

    def wait(self):
        """Let the stream wait; the host goes on."""

    def synchronize(self):
        self.waits += 1


def moved(layers, *, bucket_bytes):
    """Launches of a first move and of a later one, from TP2 to a replica on each rank."""
    held = []
    for rank in range(RANKS):
        sides = []
        for tensor_size in (2, 1):
            with model(layers, tensor_size=tensor_size, rank=rank) as (chunks, mesh):
                sides.append(described(chunks, mesh))
        held.append(sides)
    launch = Exchange([(source[0], target[0]) for source, target in held])
    resharder = Resharder(*held[0], launch, launch, bucket_bytes=bucket_bytes)
    found = []
    for _ in range(2):
        with Operators() as operators:
            resharder.move()
        found.append(operators.total)
        resharder.release()
        assert all(t.untyped_storage().size() == 0 for t in held[0][1][1])
    assert launch.waits == 2 * 2, "before and after, for the clock"
    return found, launch.messages


def test_a_move_copies_each_piece_once_a_side_and_waits_only_for_the_clock():
    (few, few_again), rounds = moved(2, bucket_bytes=1 << 27)
    (more, more_again), _ = moved(4, bucket_bytes=1 << 27)
    assert rounds == 2, "one round holds this model"
    # A rank's half of a layer is 10 pieces: queries, keys and values of 2 groups, gate, up, and the
    # two other matrices. They are sent, stay here, and as many come; both norms stay.
    assert (more - few) / 2 == 3 * 10 + 2
    # Memory that was freed is filled with zeros, since it may be padding: 6 parameters of a layer.
    assert (more_again - few_again) / 2 == 3 * 10 + 2 + 6
    _, rounds = moved(2, bucket_bytes=1 << 16)
    assert rounds > 8


class HostMemory(host_memory._PinnedBuffer):
    """Counts transfers; no runtime of CUDA is here to register its memory."""

    transfers = 0

    def __init__(self, num_bytes):
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device="meta")

    def __del__(self):
        pass

    def write(self, start, source):
        HostMemory.transfers += 1
        super().write(start, source)

    def read(self, start, target):
        HostMemory.transfers += 1
        super().read(start, target)


def trained(chunks):
    """A state with moments, as after a first step."""
    state = TrainState(chunks, OptimizerConfig(), total_steps=2)
    for part in state.optimizers():
        inner = part.optimizer
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            names = ("exp_avg", "exp_avg_sq")
            inner.state[parameter] = {name: torch.zeros_like(parameter) for name in names}
    return state


def offloaded(layers, monkeypatch):
    """Launches of each part, loaded and offloaded once."""
    waits = []
    monkeypatch.setattr(host_memory, "_PinnedBuffer", HostMemory)
    with model(layers, tensor_size=2, rank=0) as (chunks, mesh):
        here = SimpleNamespace(
            name="cuda", synchronize=lambda: waits.append(1), empty_cache=lambda: None
        )
        critic, reference = (
            build_chunks(chunks[0].model, PrecisionConfig(), mesh, head=head)
            for head in ("scalar", "language")
        )
        parts = offload.create_offload(
            MemoryConfig(offload_idle=True, offload_optimizer=True),
            here,
            None,
            policy=trained(chunks),
            critic=trained(critic),
            reference=reference,
            rewards=[],
        )
        parts.start()
        found = {}
        for name in ("reference", "critic", "policy_optimizer"):
            waits.clear()
            HostMemory.transfers = 0
            with Operators() as operators, parts.on_device(name):
                pass
            assert len(waits) == 4, "around each way, for the clock"
            found[name] = (operators.total, HostMemory.transfers)
    return found


def test_offloading_copies_each_storage_once_a_way(monkeypatch):
    few, more = (offloaded(layers, monkeypatch) for layers in (2, 4))
    # A frozen layer has 6 parameters, each of its own storage, which come back and never change.
    assert more["reference"][1] - few["reference"][1] == 2 * 6
    # Weights that learn are in one buffer, whatever their number: one copy each way.
    assert few["critic"] == more["critic"] == (2, 2)
    # Masters and two moments of each parameter; the gradients' buffer is filled.
    assert (more["policy_optimizer"][1] - few["policy_optimizer"][1]) / 2 <= 2 * 3 * 6
    assert all(total <= transfers + 1 for total, transfers in (*few.values(), *more.values()))
