"""What has a plan, and which ranks it is made of."""

import pytest

from marlhf_mega.config.load import ConfigError, with_keys
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.plan import make_plan
from tests.unit.plan.plans import DISAGGREGATED, cluster, planned_disaggregated


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"rollout.ranks": 128}, "rollout.ranks=128: must leave ranks that train; 128 are started"),
        ({"rollout.ranks": 30}, "parallel: tensor_size * pipeline_size * context_size = 32 must"),
        ({"rollout.pipeline_size": 5}, "rollout: tensor_size * pipeline_size * context_size = 40"),
        (
            {"ppo.minibatch_size": 80},
            "ppo.minibatch_size=80: must be a multiple of the data-parallel size 3. Use 78 or 81.",
        ),
        (
            {"rollout.staleness": 1, "ppo.tis_cap": None},
            "rollout.staleness=1: samples from older weights need the correction ppo.tis_cap;",
        ),
    ],
)
def test_what_a_start_would_refuse_has_no_plan(keys, line):
    with pytest.raises(ConfigError) as caught:
        planned_disaggregated(keys)
    assert str(caught.value).startswith(line)


def test_other_jobs_have_no_such_ranks():
    config = with_keys(Config.model_validate(DISAGGREGATED), {"sft.batch_size": 64})
    plan = make_plan(config, "sft", cluster())
    assert (plan.work.layout.data, plan.rollout_stages) == (4, ())
