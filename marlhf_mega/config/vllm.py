"""What a vLLM engine cannot do, of what the configuration may ask."""

from collections.abc import Iterator

from marlhf_mega.config.schema import Config

MOST_KEPT = 256
"""Largest top-k: vLLM returns every kept token as an object of Python."""


def vllm_problems(config: Config, *, learns: bool) -> Iterator[str]:
    """Describe what does not go together with `rollout.engine=vllm`, one line each.

    Args:
        config: the resolved configuration.
        learns: whether a job learns from the samples themselves, as ppo does.
    """
    rollout, model = config.rollout, config.model
    if rollout.engine != "vllm":
        return
    if rollout.cuda_graphs:
        yield (
            "rollout.cuda_graphs=true: is of our own decoder; rollout.engine=vllm records graphs "
            "unless rollout.vllm.enforce_eager is set. Remove it."
        )
    if rollout.pipeline_size not in (None, 1):
        yield (
            f"rollout.pipeline_size={rollout.pipeline_size}: an engine of rollout.engine=vllm has "
            "tensor-parallel ranks only. Use rollout.tensor_size, or rollout.engine=own."
        )
    if learns and config.replays_routing:
        yield (
            "ppo.router_replay=true: rollout.engine=vllm does not tell which experts tokens go to. "
            "Set it false, or use rollout.engine=own."
        )
    if learns and rollout.is_filtered and rollout.mask_interval is None:
        yield from _filter_problems(config)
    tensor, width = config.rollout_parallel.tensor_size, model.expert_ffn_hidden_size
    if model.num_experts and width and width % tensor:
        yield (
            f"rollout.tensor_size={tensor}: rollout.engine=vllm splits experts, so it must divide "
            f"model.expert_ffn_hidden_size={width}. Use another one."
        )


def _filter_problems(config: Config) -> Iterator[str]:
    """Describe which filters samples to learn from cannot have: their kept tokens are needed."""
    rollout = config.rollout
    if not 0 < rollout.top_k <= MOST_KEPT:
        yield (
            f"rollout.top_k={rollout.top_k}: must be from 1 to {MOST_KEPT} with filters in ppo and "
            "rollout.engine=vllm, which hands over each token that is kept. Set it so, or use "
            "rollout.engine=own."
        )
    if config.ppo.old_logprobs == "sampler":
        yield (
            "ppo.old_logprobs=sampler: filters of rollout.engine=vllm leave log-probs among the "
            "kept tokens only, and the KL penalty compares others. Use ppo.old_logprobs=trainer."
        )
