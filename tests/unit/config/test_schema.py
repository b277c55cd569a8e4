"""Values that a configuration derives from its keys."""

import pytest
from pydantic import ValidationError

from marlhf_mega.config.schema import Config


def test_a_preset_sets_its_keys_and_a_dumped_configuration_is_the_same():
    config = Config.model_validate({"macro": {"compat": "ma_rlhf"}, "ppo": {"epochs": 2}})
    assert (config.macro.reward, config.ppo.whiten_advantages) == ("mean", False)
    assert config.ppo.epochs == 2
    assert Config.model_validate(config.model_dump()) == config
    plain = Config()
    assert (plain.macro.reward, plain.ppo.whiten_advantages) == ("sum", True)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"macro": {"reward": "sum"}}, "macro.reward=sum: must be mean"),
        ({"ppo": {"whiten_advantages": True}}, "ppo.whiten_advantages=true: must be false"),
    ],
)
def test_a_key_that_a_preset_decides_is_refused_where_it_differs(sections, line):
    macro = {"compat": "ma_rlhf"} | sections.pop("macro", {})
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"macro": macro} | sections)
    assert (
        f"{line} with macro.compat=ma_rlhf, which reproduces the released code. "
        "Remove one of the two."
    ) in str(caught.value)


def test_two_ways_to_say_the_warm_up_are_refused():
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"critic": {"warmup_steps": 3, "warmup_ratio": 0.1}})
    assert (
        "critic.warmup_ratio=0.1: replaces warmup_steps, which is 3. Remove one of the two."
    ) in str(caught.value)


def test_the_log_ratio_of_a_dpo_model_needs_the_reference():
    ppo = {"kl_coef": 0.0, "estimator": "grpo"}
    for kind, needs in (("rto", True), ("clause", False)):
        reward = {"dense": {"source": "m", "kind": kind}}
        assert Config.model_validate({"ppo": ppo, "reward": reward}).has_reference is needs
