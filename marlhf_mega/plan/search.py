"""Layouts of a job on a cluster, those that fit ranked by estimated step time."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from marlhf_mega.config.checks import rollout_ranks
from marlhf_mega.config.limits import context_multiple
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.layout import round_up
from marlhf_mega.plan.plan import Cluster, Plan, make_plan, with_keys
from marlhf_mega.plan.workload import microbatch_keys

_SIZES = (1, 2, 4, 8, 16)
_MICROBATCHES = (1, 2, 4, 8, 16)
_SHARED_TOKENS = 4096
"""Of a sequence, for each rank that shares it; with fewer it is not worth the messages."""
_OFFLOAD = {"memory.offload_idle": True, "memory.offload_optimizer": True}


def search(config: Config, job: str, cluster: Cluster) -> list[tuple[dict[str, Any], Plan]]:
    """Try layouts, recomputation and microbatch sizes; offload where nothing else makes it fit.

    Of ranks that only generate also other numbers, where the configuration has some. The factor of
    scoring stays as it is: no estimated time falls with it.

    Returns:
        The changed keys and the plan of everything that fits, the fastest first; of layouts that
        take as long the one that leaves the most memory.
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
    ranks = _rollout_ranks(config, job, cluster)
    for tensor, pipeline, context, apart in product(tensors, _SIZES, contexts, ranks):
        if (cluster.world_size - apart) % (tensor * pipeline * context):
            continue
        multiple = tensor * context_multiple(context)
        chunks = (1, 2, 4) if pipeline > 1 else (1,)
        for virtual, rows, recompute in product(chunks, _MICROBATCHES, ("none", "full")):
            yield {
                "parallel.tensor_size": tensor,
                "parallel.pipeline_size": pipeline,
                "parallel.virtual_pipeline_size": virtual,
                "parallel.context_size": context,
                "parallel.sequence_parallel": tensor > 1,
                "memory.recompute": recompute,
                "memory.recompute_num_layers": None,
                **microbatch_keys(config, job, rows=rows, seq=round_up(longest, multiple)),
                **({"rollout.ranks": apart} if apart else {}),
            }


def _rollout_ranks(config: Config, job: str, cluster: Cluster) -> list[int]:
    """Return the numbers of ranks that only generate to try."""
    own, world = rollout_ranks(config, job), cluster.world_size
    return sorted({own, world // 8, world // 4, world // 2} - {0}) if own else [0]
