"""What tests of vLLM need."""

import pytest

from marlhf_mega.platform import vllm

needs_vllm = pytest.mark.skipif(
    not vllm.support(), reason=f"needs vLLM: {vllm.support().reason}; tests/run.sh --vllm has one"
)
