"""Updates whose gradients are not finite."""

from types import SimpleNamespace

import pytest

from marlhf_mega.config.schema import Config
from marlhf_mega.update.skipped import keep_skipped


def test_too_many_skipped_steps_of_a_reward_model_name_its_learning_rate(tmp_path):
    config = Config.model_validate({"run": {"dir": tmp_path, "max_skipped_steps": 0}})
    rank = SimpleNamespace(rank=0, is_replica_leader=False)
    with pytest.raises(RuntimeError, match=r"gradients of reward .* or lower reward_model\.lr\.$"):
        keep_skipped(1, {}, config, rank, role="reward", step=0)
