"""Ranks of these tests are forked from a process that has imported vLLM too."""

from marlhf_mega.platform import vllm
from tests.distributed.ranks import FORKS

if vllm.support():
    FORKS.set_forkserver_preload(["tests.distributed.preload", "tests.vllm.preload"])
