"""Bytes that leave a CPU process for a file without a name."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from marlhf_mega.platform import current
from marlhf_mega.platform.host_memory import host_buffer

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
