"""What a forked rank has imported already besides our package."""

from marlhf_mega.rollout.vllm_process import import_vllm

import_vllm().LLM  # noqa: B018  imported when it is asked for
