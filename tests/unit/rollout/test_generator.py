"""Rollouts of one rank, against plainer ways to generate."""

import torch

from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions


def test_a_shared_prompt_is_answered_as_if_it_were_read_for_each_sample(model):
    chunks, mesh = model
    fill_random(chunks, mesh, seed=1)
    prompts = [[3, 4, 5], [3, 4, 5], [6, 7], [3, 4, 5], [6, 7]]

    def sampled(slots):
        return Generator(chunks, mesh, stop=StopRule()).generate(
            prompts,
            range(5),
            RolloutOptions(
                rule=SamplingRule(temperature=1.0),
                max_response_tokens=7,
                slots=slots,
                seed=0,
                step=0,
            ),
        )

    together, alone = sampled(5), sampled(1)
    assert together.responses == alone.responses
    assert len({tuple(r) for r in together.responses}) == 5
    atol = 1e-5 if chunks[0].config.params_dtype == torch.float32 else 0.02
    torch.testing.assert_close(together.logprobs, alone.logprobs, rtol=0, atol=atol)
