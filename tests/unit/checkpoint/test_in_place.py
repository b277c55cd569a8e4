"""Boxes of saved tensors are read into existing tensors, whatever the size of the buffer."""

import itertools

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint

from marlhf_mega.checkpoint import in_place

SHAPE = (4, 5, 3)
WHOLE = torch.arange(60, dtype=torch.float32).view(SHAPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    tensors = {"cube": WHOLE, "vector": WHOLE[0, :, 0].clone(), "number": torch.tensor(2.5)}
    torch_checkpoint.save(tensors, checkpoint_id=path, no_dist=True)
    return path


def piece(key, target, offset, shape, *, prepended=0):
    return in_place.ShardedTensor(
        key=key,
        data=target,
        dtype=target.dtype,
        local_shape=tuple(target.shape),
        global_shape=shape,
        global_offset=offset,
        axis_fragmentations=None,
        prepend_axis_num=prepended,
    )


@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_any_box_is_read_with_any_buffer(folder, monkeypatch, block_bytes):
    monkeypatch.setattr(in_place, "READ_BLOCK_BYTES", block_bytes)
    ranges = [list(itertools.combinations(range(size + 1), 2)) for size in SHAPE]
    boxes = list(itertools.product(*ranges))[:: 7 if block_bytes > 1 else 31]
    targets = [torch.full([hi - lo for lo, hi in box], -1.0) for box in boxes]
    in_place.read_into(
        folder,
        [
            piece("cube", target, tuple(lo for lo, _ in box), SHAPE)
            for box, target in zip(boxes, targets, strict=True)
        ],
    )
    for box, target in zip(boxes, targets, strict=True):
        assert torch.equal(target, WHOLE[tuple(slice(*bounds) for bounds in box)])


def test_targets_may_be_views_of_another_format_with_a_prepended_axis(folder):
    matrix = torch.zeros(5, 6, dtype=torch.bfloat16)
    vector, number = torch.zeros(2), torch.zeros(())
    in_place.read_into(
        folder,
        [
            piece("cube", matrix[:, ::2], (2, 0, 0), SHAPE, prepended=1),
            piece("vector", vector, (3,), (5,)),
            piece("number", number, (), ()),
        ],
    )
    assert torch.equal(matrix[:, ::2], WHOLE[2].bfloat16())
    assert not matrix[:, 1::2].any()
    assert vector.tolist() == [9.0, 12.0]
    assert number.item() == 2.5


def test_what_the_checkpoint_does_not_cover_keeps_its_values(folder):
    target = torch.full((7,), -1.0)
    in_place.read_into(folder, [piece("vector", target, (0,), (7,))])
    assert target.tolist() == [0.0, 3.0, 6.0, 9.0, 12.0, -1.0, -1.0]
