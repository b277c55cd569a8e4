"""Plans that several files test."""

from marlhf_mega.config.load import with_keys
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.gpus import find_gpu
from marlhf_mega.plan.plan import Cluster, make_plan
from tests.unit.plan.shapes import LLAMA_70B

PPO = {
    "model": LLAMA_70B,
    "parallel": {"tensor_size": 8, "pipeline_size": 4, "sequence_parallel": True},
    "rollout": {"batch_size": 256, "max_response_tokens": 1024},
    "ppo": {"minibatch_size": 256, "microbatch_size": 8},
    "reward": {"source": "runs/none/reward"},
}
LONG = PPO | {
    "data": {"max_prompt_tokens": 7168},
    "parallel": {"tensor_size": 8, "context_size": 2, "sequence_parallel": True},
}
DISAGGREGATED = {
    "model": LLAMA_70B,
    "parallel": {"tensor_size": 8, "pipeline_size": 4, "sequence_parallel": True},
    "rollout": {"batch_size": 240, "max_response_tokens": 1024, "ranks": 32, "pipeline_size": 1},
    "ppo": {"minibatch_size": 240, "microbatch_size": 2, "tis_cap": 2.0},
    "reward": {"source": "runs/none/reward"},
}
WHOLE = 8_820_367_360
"""Parameters of a rank that holds an eighth of all layers: 80 x 106,971,136, two shards of
16032 x 8192 of the vocabulary, and a norm of 8192."""


def cluster(nodes=16, gpu="H100"):
    return Cluster(nodes=nodes, gpus_per_node=8, gpu=find_gpu(gpu))


def planned(changes=None, **options):
    return make_plan(
        with_keys(Config.model_validate(PPO), changes or {}), "ppo", cluster(**options)
    )


def planned_disaggregated(changes=None):
    return make_plan(
        with_keys(Config.model_validate(DISAGGREGATED), changes or {}), "ppo", cluster()
    )
