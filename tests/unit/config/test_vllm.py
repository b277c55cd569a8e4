import pytest

from marlhf_mega.config.checks import check_sizes, check_world
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.methods import online_problems
from marlhf_mega.config.schema import Config
from marlhf_mega.config.unread import unread_keys
from marlhf_mega.config.vllm import vllm_problems

EXPERTS = {
    "architecture": "mixtral",
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_ffn_hidden_size": 96,
    "num_attention_heads": 10,
    "num_query_groups": 10,
    "hidden_size": 80,
    "ffn_hidden_size": 120,
}


def config_for(model=None, parallel=None, ppo=None, **rollout):
    return Config.model_validate(
        {
            "model": model or {},
            "parallel": parallel or {},
            "ppo": ppo or {},
            "rollout": {"engine": "vllm"} | rollout,
        }
    )


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            config_for(cuda_graphs=True),
            "rollout.cuda_graphs=true: is of our own decoder; rollout.engine=vllm records graphs "
            "unless rollout.vllm.enforce_eager is set. Remove it.",
        ),
        (
            config_for(pipeline_size=2),
            "rollout.pipeline_size=2: an engine of rollout.engine=vllm has tensor-parallel ranks "
            "only. Use rollout.tensor_size, or rollout.engine=own.",
        ),
        (
            config_for(top_p=0.9),
            "rollout.top_k=0: must be from 1 to 256 with filters in ppo and rollout.engine=vllm, "
            "which hands over each token that is kept. Set it so, or use rollout.engine=own.",
        ),
        (
            config_for(top_k=257),
            "rollout.top_k=257: must be from 1 to 256 with filters in ppo and rollout.engine=vllm, "
            "which hands over each token that is kept. Set it so, or use rollout.engine=own.",
        ),
        (
            config_for(top_k=256, ppo={"old_logprobs": "sampler"}),
            "ppo.old_logprobs=sampler: filters of rollout.engine=vllm leave log-probs among the "
            "kept tokens only, and the KL penalty compares others. Use ppo.old_logprobs=trainer.",
        ),
        (
            config_for(EXPERTS),
            "ppo.router_replay=true: rollout.engine=vllm does not tell which experts tokens go to. "
            "Set it false, or use rollout.engine=own.",
        ),
        (
            config_for(EXPERTS, tensor_size=5, ppo={"router_replay": False}),
            "rollout.tensor_size=5: rollout.engine=vllm splits experts, so it must divide "
            "model.expert_ffn_hidden_size=96. Use another one.",
        ),
    ],
)
def test_what_an_engine_cannot_do_is_refused_in_one_line(config, text):
    assert list(vllm_problems(config, learns=True)) == [text]
    with pytest.raises(ConfigError) as error:
        check_sizes(config, "ppo", 1)
    assert text in str(error.value).splitlines()


def test_filters_are_taken_where_nothing_is_learned_from_the_samples():
    assert list(vllm_problems(config_for(top_p=0.9), learns=False)) == []


def test_filters_that_keep_few_tokens_are_taken_in_ppo():
    assert list(vllm_problems(config_for(top_k=256, top_p=0.9), learns=True)) == []


def test_pairs_of_the_policy_itself_are_drawn_where_it_trains():
    (line,) = [x for x in online_problems(config_for()) if "engine" in x]
    assert line.startswith("rollout.engine=vllm: preference.loss=")
    assert line.endswith(" generates where it trains. Remove it.")


def test_our_decoder_has_none_of_these_rules():
    config = config_for(engine="own", cuda_graphs=True, pipeline_size=2, top_k=5)
    assert list(vllm_problems(config, learns=True)) == []


def test_an_engine_has_tensor_parallel_ranks_and_replicas_only():
    parallel = {"tensor_size": 2, "pipeline_size": 2, "sequence_parallel": True}
    config = config_for(parallel=parallel)
    assert config.moves_weights
    assert config.rollout_parallel.model_dump(exclude_defaults=True) == {"tensor_size": 2}
    assert config_for(parallel=parallel, tensor_size=1).rollout_parallel.model_size == 1


def test_experts_are_taken_at_every_size_that_splits_them():
    config = config_for(EXPERTS | {"vocab_size": 80}, tensor_size=2)
    assert check_world(config, 4) == 4
    assert config.rollout_parallel.expert_size == 1


def test_replicas_of_an_engine_must_fill_the_ranks():
    model = {"num_attention_heads": 12, "hidden_size": 96, "vocab_size": 90}
    config = config_for(model=model, tensor_size=3)
    with pytest.raises(ConfigError, match=r"^rollout: tensor_size .* = 3 must divide the number"):
        check_world(config, 4)


def test_settings_of_an_engine_that_is_not_used_are_named():
    config = config_for(engine="own", vllm={"enforce_eager": True})
    (found,) = [text for text in unread_keys(config, "ppo", {}) if "vllm" in text]
    assert found.startswith("rollout.vllm=")
    assert found.endswith("with rollout.engine=own")
