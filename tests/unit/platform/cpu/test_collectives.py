"""Megatron's groups on gloo, with a world of one rank."""

import pytest
import torch
import torch.distributed as dist

from marlhf_mega.platform.cpu.collectives import new_group


@pytest.fixture
def join():
    def join_world():
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    yield join_world
    dist.destroy_process_group()


def test_groups_of_one_rank_are_shared_within_their_world(join):
    join()
    group = new_group([0])
    assert new_group(ranks=[0], timeout=None, group_desc="another") is group
    assert group is not dist.group.WORLD
    # Who names a backend destroys the group alone.
    assert new_group([0], backend="gloo") is not group
    join()
    assert new_group([0]) is not group
    value = torch.ones(1)
    dist.all_reduce(value, group=new_group([0]))
    assert value.item() == 1
