"""A layout's sizes and its name."""

import pytest

from marlhf_mega.config.sections.hardware import ParallelConfig
from marlhf_mega.plan.layout import WorldLayout


@pytest.mark.parametrize(
    ("degrees", "world", "data", "name"),
    [
        ({}, 8, 8, "TP1 x PP1 x DP8"),
        (
            {"tensor_size": 8, "pipeline_size": 4, "sequence_parallel": True},
            128,
            4,
            "TP8 x PP4 x DP4 + SP",
        ),
        (
            {"tensor_size": 2, "pipeline_size": 2, "virtual_pipeline_size": 3, "context_size": 2},
            16,
            2,
            "TP2 x PP2 x VPP3 x CP2 x DP2",
        ),
        ({"expert_size": 4}, 8, 8, "TP1 x PP1 x EP4 x DP8"),
    ],
)
def test_the_data_parallel_size_is_the_world_over_the_other_degrees(degrees, world, data, name):
    layout = WorldLayout.of(ParallelConfig(**degrees), world)
    assert (layout.data, layout.world, layout.describe()) == (data, world, name)


def test_norms_are_split_along_the_sequence_with_sequence_parallelism_only():
    degrees = {"tensor_size": 4, "context_size": 2}
    plain = WorldLayout.of(ParallelConfig(**degrees), 8)
    split = WorldLayout.of(ParallelConfig(**degrees, sequence_parallel=True), 8)
    assert (plain.sequence_share, split.sequence_share) == (1, 4)
    assert plain.context_multiple == 4
