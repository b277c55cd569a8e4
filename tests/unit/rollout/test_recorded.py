"""Recorded decode steps, against steps that are run one by one.

What is recorded here is repeated by running it again on the tensors it was recorded with, as a
CUDA graph does.
"""

import pytest
import torch

from marlhf_mega.checkpoint.weights import fill_random
from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.rollout import generator, recorded
from marlhf_mega.rollout.decoder import ChunkDecoder, generating
from marlhf_mega.rollout.drawing import draw
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.rollout.work import Decode

PROMPTS = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12], [13, 14]]
PLAIN = SamplingRule(temperature=1.0)
FILTERED = SamplingRule(temperature=0.8, top_k=9, top_p=0.9, record_kept=True)
LIMITS = dict(enumerate([30, 45, 12, 21, 40]))


class Recorder:
    """Counts what it records and repeats."""

    def __init__(self):
        self.repeated = []

    def __call__(self, step):
        output, number = step(), len(self.repeated)
        self.repeated.append(0)

        def repeat():
            self.repeated[number] += 1
            for part, new in zip(output, step(), strict=True):
                part.copy_(new)

        return output, repeat


@pytest.fixture(scope="module")
def model():
    config = Config.model_validate(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 48,
                "vocab_size": 50,
            },
            "precision": {"dtype": "float32"},
            "reward": {"source": "random"},
        }
    )
    mesh = create_mesh(config.parallel)
    chunks = build_chunks(config.model, config.precision, mesh, head="language")
    fill_random(chunks, mesh, seed=1)
    yield chunks, mesh
    destroy_mesh()


def generate(chunks, mesh, *, rule=PLAIN, **options):
    return answered(Generator(chunks, mesh, stop=StopRule(), **options), rule=rule)


def answered(kept, limits=LIMITS, slots=3, rule=PLAIN):
    return kept.generate(
        PROMPTS,
        range(5),
        RolloutOptions(
            rule=rule,
            max_response_tokens=limits,
            slots=slots,
            seed=0,
            step=0,
        ),
    )


@pytest.mark.parametrize(
    ("slot_step", "length_step", "rule"), [(2, 8, PLAIN), (8, 128, PLAIN), (2, 8, FILTERED)]
)
def test_responses_are_those_of_plain_steps(model, monkeypatch, slot_step, length_step, rule):
    recorder = Recorder()
    monkeypatch.setattr(recorded, "GraphRecorder", lambda: recorder)
    monkeypatch.setattr(recorded, "SLOT_STEP", slot_step)
    monkeypatch.setattr(recorded, "GRAPH_LENGTH_STEP", length_step)
    plain, found = generate(*model, rule=rule), generate(*model, rule=rule, cuda_graphs=True)
    assert found.responses == plain.responses
    torch.testing.assert_close(found.logprobs, plain.logprobs)
    if rule.record_kept:
        assert torch.equal(found.kept, plain.kept)
        torch.testing.assert_close(found.full_logprobs, plain.full_logprobs)
    # The longest three go on for 45 tokens or so; every size is run once and recorded once.
    assert sum(recorder.repeated) > 40
    assert min(recorder.repeated) > 0


def test_a_step_is_recorded_when_its_size_comes_again(model):
    (chunk,), _ = model
    recorder = Recorder()
    generator = torch.Generator().manual_seed(0)
    with generating([chunk]):
        plain = ChunkDecoder(chunk, num_slots=9, max_tokens=200)
        steps = recorded.RecordedSteps(ChunkDecoder(chunk, num_slots=9, max_tokens=200), recorder)
        counts = []
        for batch, position in [(9, 0), (8, 1), (5, 2), (3, 127), (2, 128), (2, 150), (1, 160)]:
            work = Decode(
                tokens=torch.zeros(batch, 1, dtype=torch.int64),
                positions=torch.full((batch,), position),
                longest=position + 1,
            )
            hidden = torch.randn(1, batch, 32, generator=generator)
            torch.testing.assert_close(steps.run(work, hidden), plain.run(work, hidden))
            counts.append(list(recorder.repeated))
    # 9 slots are all there are, fewer fill up to 8; 128 tokens are one size, 200 the last.
    assert counts == [[], [], [1], [2], [2], [2, 1], [2, 2]]


def test_what_is_recorded_serves_later_rollouts_while_sizes_fit_and_weights_stay(
    model, monkeypatch
):
    chunks, mesh = model
    recorder = Recorder()
    monkeypatch.setattr(recorded, "GraphRecorder", lambda: recorder)
    monkeypatch.setattr(recorded, "GRAPH_LENGTH_STEP", 16)
    kept = Generator(chunks, mesh, stop=StopRule(), cuda_graphs=True)

    def new_records(**options):
        """What a rollout adds to them; its responses are those of plain steps."""
        before = len(recorder.repeated)
        found = answered(kept, **options)
        plain = answered(Generator(chunks, mesh, stop=StopRule()), **options)
        assert found.responses == plain.responses
        torch.testing.assert_close(found.logprobs, plain.logprobs)
        return len(recorder.repeated) - before

    first = new_records()
    assert first > 2
    fill_random(chunks, mesh, seed=2)  # an update writes weights where they are
    assert new_records() == 0
    assert new_records(slots=2, limits=dict.fromkeys(range(5), 5)) == 0
    # A model that diverged leaves no number behind.
    for group in kept.kept[0].take(1, num_slots=1, max_tokens=1):
        group[0].decoder.cache.values.fill_(torch.nan)
    assert new_records() == 0
    assert new_records(limits=dict.fromkeys(range(5), 70)) > 2  # longer than there is room for
    assert new_records() == 0
    weight = next(chunks[0].parameters())
    weight.data = weight.data.clone()
    assert new_records() == first
    fill_random(chunks, mesh, seed=1)


def test_tokens_are_drawn_inside_and_each_rule_has_records_of_its_own(model, monkeypatch):
    chunks, mesh = model
    recorder, outside = Recorder(), []
    monkeypatch.setattr(recorded, "GraphRecorder", lambda: recorder)
    kept = Generator(chunks, mesh, stop=StopRule(), cuda_graphs=True)
    records = []
    for rule in (PLAIN, FILTERED, SamplingRule(temperature=0.0), PLAIN):
        plain = generate(chunks, mesh, rule=rule)
        with monkeypatch.context() as patch:
            patch.setattr(generator, "draw", lambda *given: outside.append(1) or draw(*given))
            assert answered(kept, rule=rule).responses == plain.responses
        records.append(len(recorder.repeated))
    assert 0 < records[0] < records[1] < records[2] == records[3]
    # Only first tokens are drawn outside, after their prompts have been read.
    assert len(outside) <= 4 * len(PROMPTS)
