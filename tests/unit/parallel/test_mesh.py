"""Which process groups a layout makes, in a fake world."""

import pytest
import torch.distributed as dist

from marlhf_mega.config.sections.hardware import ParallelConfig
from marlhf_mega.parallel.fake_mesh import fake_mesh


def created(monkeypatch, world_size, rank=0, **degrees):
    """The ranks of every group that `rank` takes part in creating, and its mesh's groups."""
    calls, real = [], dist.new_group

    def new_group(ranks, *arguments, **options):
        calls.append(ranks)
        return real(ranks, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(dist, "new_group", new_group)
        with fake_mesh(ParallelConfig(**degrees), rank=rank, world_size=world_size) as mesh:
            groups = {
                axis: dist.get_process_group_ranks(getattr(mesh.groups, axis))
                for axis in ("tp", "pp", "cp", "ep", "dp", "dp_cp", "embd", "mp", "expt_dp")
                if getattr(mesh.groups, axis) is not None
            }
    return calls, groups


@pytest.mark.parametrize(
    ("world_size", "degrees", "most"),
    [
        # 785 with Megatron's own creation, 544 of them of one rank.
        (128, {"tensor_size": 8, "pipeline_size": 4}, 160),
        (8, {"tensor_size": 4}, 8),
        (1, {}, 1),
    ],
)
def test_a_set_of_ranks_has_one_group(monkeypatch, world_size, degrees, most):
    calls, _ = created(monkeypatch, world_size, **degrees)
    shared = [tuple(ranks) for ranks in calls if len(ranks) > 1]
    pipelines = world_size // degrees.get("pipeline_size", 1)
    # The rollouts' copies of the pipelines are groups of their own.
    copies = pipelines if degrees.get("pipeline_size", 1) > 1 else 0
    assert len(shared) - len(set(shared)) == copies
    assert [ranks for ranks in calls if len(ranks) == 1] == [[0]]
    assert len(calls) <= most


def test_every_axis_has_its_ranks(monkeypatch):
    """Rank = tp + 2 dp + 4 pp, as TP is the fastest axis and PP the slowest."""
    for rank in range(8):
        tp, dp, pp = rank % 2, rank // 2 % 2, rank // 4
        _, groups = created(monkeypatch, 8, rank, tensor_size=2, pipeline_size=2)
        data = [tp + 2 * i + 4 * pp for i in range(2)]
        pipeline = [tp + 2 * dp + 4 * i for i in range(2)]
        tensor = [i + 2 * dp + 4 * pp for i in range(2)]
        assert groups == {
            "tp": tensor,
            "pp": pipeline,
            "cp": [rank],
            "ep": [rank],
            "dp": data,
            "dp_cp": data,
            "embd": pipeline,
            "mp": sorted(i + 4 * j + 2 * dp for i in range(2) for j in range(2)),
            "expt_dp": [i + 4 * pp for i in range(4)],
        }
