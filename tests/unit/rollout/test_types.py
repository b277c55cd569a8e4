import torch

from marlhf_mega.config.schema import Config
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.types import Rollout, RolloutOptions


def test_the_mask_covers_each_responses_tokens():
    rollout = Rollout(
        prompts=[[1], [1, 2]],
        responses=[[5], [6, 7, 8]],
        finished=[True, False],
        sample_indices=[0, 1],
        logprobs=torch.zeros(2, 3),
    )
    found = rollout.response_mask(torch.device("cpu"))
    assert found.tolist() == [[True, False, False], [True, True, True]]


def test_options_are_those_of_the_configuration_and_the_caller_may_choose_the_slots():
    rollout = {"temperature": 0.5, "top_k": 7, "max_response_tokens": 9, "slots": 3}
    config = Config.model_validate({"run": {"seed": 21}, "rollout": rollout})
    options = RolloutOptions.of(config, step=4, for_training=True)
    rule = SamplingRule(temperature=0.5, top_k=7, record_kept=True)
    assert options == RolloutOptions(rule=rule, max_response_tokens=9, seed=21, step=4, slots=3)
    assert RolloutOptions.of(config, step=4, slots=5).slots == 5


def test_only_samples_to_train_on_have_a_mask():
    rollout = {"top_p": 0.9, "mask_interval": 5, "mask_min_tokens": 7}
    config = Config.model_validate({"rollout": rollout})
    assert RolloutOptions.of(config, step=0).rule.min_kept is None
    assert RolloutOptions.of(config, step=0, masked=True).rule.min_kept == 7


def test_a_limit_is_for_all_samples_or_for_each():
    rule = SamplingRule(temperature=1.0)
    shared = RolloutOptions(rule=rule, max_response_tokens=9, seed=0, step=0)
    own = RolloutOptions(rule=rule, max_response_tokens={4: 2, 8: 6}, seed=0, step=0)
    assert [shared.limit_of(4), own.limit_of(4), own.limit_of(8)] == [9, 2, 6]
