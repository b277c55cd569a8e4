"""Configuration files for `marlhf plan`."""

import json

import pytest

from tests.unit.plan.plans import DISAGGREGATED, PPO


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "70b.yaml"
    path.write_text(json.dumps(PPO))
    return str(path)


@pytest.fixture
def disaggregated_file(tmp_path):
    path = tmp_path / "disaggregated.yaml"
    path.write_text(json.dumps(DISAGGREGATED))
    return str(path)
