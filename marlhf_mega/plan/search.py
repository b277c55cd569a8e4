"""Finds layouts of a job that fit a cluster, ranked by estimated step time."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from marlhf_mega.config.checks import rollout_ranks
from marlhf_mega.config.limits import context_multiple, round_up
from marlhf_mega.config.load import ConfigError, with_keys
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.plan import Cluster, Plan, make_plan
from marlhf_mega.plan.workload import microbatch_keys

_SIZES = (1, 2, 4, 8, 16)
_MICROBATCHES = (1, 2, 4, 8, 16)
_SHARED_TOKENS = 4096
"""Fewest tokens per context-parallel rank that are worth the communication."""
_OFFLOAD = {"memory.offload_idle": True, "memory.offload_optimizer": True}


def search(config: Config, job: str, cluster: Cluster) -> list[tuple[dict[str, Any], Plan]]:
    """Try layouts, recomputation and microbatch sizes, and offloading if the job does not fit.

    If the configuration has ranks that only generate, other numbers of them are tried too.
    `ppo.scoring_microbatch_factor` stays, as no estimated time depends on it.

    Returns:
        Changed keys and plans of all that fit, the fastest first; of equally fast ones, that with
        the most memory left.
    """
    found = []
    may_rest = job == "ppo" and not config.precision.fp8_param_gather
    for keys in _candidates(config, job, cluster):
        for changed in (keys, keys | _OFFLOAD) if may_rest else (keys,):
            try:
                plan = make_plan(with_keys(config, changed), job, cluster)
            except ConfigError:
                break
            if plan.fits:
                found.append((changed, plan))
                break
    return sorted(found, key=lambda pair: (round(pair[1].step_seconds, 2), -pair[1].spare))


def _candidates(config: Config, job: str, cluster: Cluster) -> Iterator[dict[str, Any]]:
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    tensors = [size for size in _SIZES if size <= cluster.gpus_per_node]
    contexts = [size for size in _SIZES if size == 1 or longest >= size * _SHARED_TOKENS]
    own, world = rollout_ranks(config, job), cluster.world_size
    ranks = sorted({own, world // 8, world // 4, world // 2} - {0}) if own else [0]
    for tensor, pipeline, context, num_rollout_ranks in product(tensors, _SIZES, contexts, ranks):
        if (cluster.world_size - num_rollout_ranks) % (tensor * pipeline * context):
            continue
        multiple = tensor * context_multiple(context)
        chunks = (1, 2, 4) if pipeline > 1 else (1,)
        for virtual, sequences, recompute in product(chunks, _MICROBATCHES, ("none", "full")):
            yield {
                "parallel.tensor_size": tensor,
                "parallel.pipeline_size": pipeline,
                "parallel.virtual_pipeline_size": virtual,
                "parallel.context_size": context,
                "parallel.sequence_parallel": tensor > 1,
                "memory.recompute": recompute,
                "memory.recompute_num_layers": None,
                **microbatch_keys(
                    config, job, sequences=sequences, seq=round_up(longest, multiple)
                ),
                **({"rollout.ranks": num_rollout_ranks} if num_rollout_ranks else {}),
            }
