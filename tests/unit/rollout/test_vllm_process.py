"""What a launch is told to vLLM as, and what its threads and draws leave."""

import os
import random
from types import SimpleNamespace

import torch

from marlhf_mega.rollout.vllm_process import launched_as, unchanged_process


def test_its_place_in_the_launch_is_told_for_as_long_as_it_starts(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = dict(os.environ)
    with launched_as(SimpleNamespace(rank=1, world_size=2)):
        assert [os.environ[name] for name in ("RANK", "WORLD_SIZE")] == ["1", "2"]
        assert os.environ["LOCAL_RANK"] == "0"
    assert dict(os.environ) == before


def test_draws_threads_and_compilation_are_as_before():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    function = torch.compile(lambda x: x + 1, backend=backend)
    before = random.getstate(), torch.get_rng_state(), torch.set_num_threads
    with unchanged_process(eager=True):
        random.random()
        torch.rand(1)
        torch.set_num_threads = None
        assert function(torch.ones(1)) == 2
    assert compiled == []
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.set_num_threads is before[2]
    with unchanged_process(eager=False):
        function(torch.ones(1))
    assert len(compiled) == 1
