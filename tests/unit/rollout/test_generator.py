"""Rollouts of one rank, against plainer ways to generate."""

from dataclasses import replace

import torch

from marlhf_mega.algorithm.counter_rng import fold, uniform
from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.sections.hardware import PrecisionConfig
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.rollout import drawing, generator
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.slots import SlotGroup
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


def test_a_mask_policy_reads_the_same_tokens_beside_the_policy(model):
    """What it keeps at a position is its own top-p after the same tokens, read at once."""
    chunks, mesh = model
    fill_random(chunks, mesh, seed=1)
    dtype = str(chunks[0].config.params_dtype).removeprefix("torch.")
    precision = PrecisionConfig(dtype=dtype)
    other = build_chunks(chunks[0].model, precision, mesh, head="language", frozen=True)
    fill_random(other, mesh, seed=2)
    shared = {"seed": 5, "step": 0, "slots": 2}
    rule = SamplingRule(temperature=2.0, top_p=0.5, record_kept=True)
    options = RolloutOptions(rule=replace(rule, min_kept=1), max_response_tokens=6, **shared)
    prompts = [[3, 4, 5], [6, 7], [8]]

    def generate(mask):
        generator = Generator(chunks, mesh, stop=StopRule(), second=mask)
        return generator.generate(prompts, range(3), options)

    found = generate(other)
    begun = [
        prompt + response[:t]
        for prompt, response in zip(prompts, found.responses, strict=True)
        for t in range(6)
    ]
    one = RolloutOptions(rule=rule, max_response_tokens=1, **shared)
    masks = Generator(other, mesh, stop=StopRule()).generate(begun, range(18), one).kept
    # In bfloat16 products of other sizes round differently.
    assert (masks.view(3, 6, -1) == found.kept).float().mean() > 0.9
    if chunks[0].config.params_dtype == torch.float32:
        assert torch.equal(masks.view(3, 6, -1), found.kept)
    plain = Generator(chunks, mesh, stop=StopRule()).generate(
        prompts, range(3), replace(options, rule=rule)
    )
    assert plain.responses != found.responses
    assert generate(chunks).responses == plain.responses
    assert torch.equal(generate(chunks).kept, plain.kept)


def test_every_draw_is_that_of_its_sample_and_position(model, monkeypatch):
    """Also after slots have moved and new prompts have come."""
    chunks, mesh = model
    fill_random(chunks, mesh, seed=1)
    seen = {}

    class Group(SlotGroup):
        def record(self, *arguments, **options):
            places = [(response.sample, len(response.tokens)) for response in self.in_flight]
            seen.update(zip(places, numbers.pop().tolist(), strict=True))
            return super().record(*arguments, **options)

    def sample(logits, drawn, **options):
        numbers.append(drawn)
        return sample_tokens(logits, drawn, **options)

    numbers, sample_tokens = [], drawing.sample_tokens
    monkeypatch.setattr(generator, "SlotGroup", Group)
    monkeypatch.setattr(drawing, "sample_tokens", sample)
    limits = dict(zip([7, 3, 90, 8, 2], [6, 2, 9, 1, 4], strict=True))
    rollout = Generator(chunks, mesh, stop=StopRule()).generate(
        [[3, 4, 5], [6, 7], [8], [9, 10], [11]],
        [*limits],
        RolloutOptions(
            rule=SamplingRule(temperature=1.0), max_response_tokens=limits, slots=2, seed=4, step=6
        ),
    )
    assert [len(response) for response in rollout.responses] == [*limits.values()]
    wanted = {
        (number, position): float(uniform(fold(fold(4, 6, sample), position)))
        for number, (sample, length) in enumerate(limits.items())
        for position in range(length)
    }
    assert seen == wanted
