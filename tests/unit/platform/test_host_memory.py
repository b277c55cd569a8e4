"""Bytes that leave a CPU process for a file without a name."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.platform import current, host_memory
from marlhf_mega.platform.host_memory import HostCopies, host_buffer

SIZE = 64


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 20)), max_size=8))
def test_a_buffer_holds_what_was_written_last(tmp_path_factory, writes):
    folder = tmp_path_factory.mktemp("host") / "new"
    buffer = host_buffer(SIZE, current(), folder)
    wanted = torch.full((SIZE,), 255, dtype=torch.uint8)
    buffer.write(0, wanted)
    for value, (start, length) in enumerate(writes):
        part = torch.full((min(length, SIZE - start),), value, dtype=torch.uint8)
        buffer.write(start, part)
        wanted[start : start + len(part)] = value
    found = torch.zeros(SIZE, dtype=torch.uint8)
    buffer.read(0, found)
    assert torch.equal(found, wanted)
    buffer.read(SIZE // 2, found[:10])
    assert torch.equal(found[:10], wanted[SIZE // 2 : SIZE // 2 + 10])
    assert list(folder.iterdir()) == []


MADE = []


class Registered(host_memory._PinnedBuffer):
    """Memory that no GPU knows of."""

    def __init__(self, num_bytes):
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        MADE.append(num_bytes)

    def __del__(self):
        pass


def test_copies_for_a_gpu_are_made_in_one_buffer_that_grows(monkeypatch):
    monkeypatch.setattr(host_memory, "_PinnedBuffer", Registered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: torch.cpu.Stream())
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda self: None, raising=False)
    copy = HostCopies(replace(current(), name="cuda"))
    small = [torch.arange(3), torch.tensor(1.5), torch.ones(2, 5).bfloat16().T, torch.zeros(0, 2)]
    for tensors in (small, [torch.rand(100), *small], small):
        copies = copy(tensors)
        for found, tensor in zip(copies, tensors, strict=True):
            assert torch.equal(found, tensor)
            assert found.dtype == tensor.dtype
    assert MADE == [3 * 64, 448 + 3 * 64]
    first = copies[0].data_ptr()
    assert first == copy(small)[0].data_ptr()
    small[0] += 1  # the model goes on
    assert copies[0].tolist() == [0, 1, 2]


def test_copies_on_a_cpu_are_plain_ones():
    weight = torch.ones(2)
    (found,) = HostCopies(current())([weight])
    weight += 1
    assert found.tolist() == [1.0, 1.0]
