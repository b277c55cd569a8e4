"""What a vLLM engine cannot do, of what the configuration may ask."""

from collections.abc import Iterator

from marlhf_mega.config.schema import Config


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
    if learns and rollout.is_filtered:
        key = f"top_k={rollout.top_k}" if rollout.top_k else f"top_p={rollout.top_p:g}"
        yield (
            f"rollout.{key}: ppo must know which tokens it kept, which rollout.engine=vllm does "
            "not tell. Remove it, or use rollout.engine=own."
        )
    tensor, width = config.rollout_parallel.tensor_size, model.expert_ffn_hidden_size
    if model.num_experts and width and width % tensor:
        yield (
            f"rollout.tensor_size={tensor}: rollout.engine=vllm splits experts, so it must divide "
            f"model.expert_ffn_hidden_size={width}. Use another one."
        )
