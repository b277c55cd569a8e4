"""What the books get of a draw, by hand, on a world of one rank."""

from types import SimpleNamespace

import pytest
import torch

from marlhf_mega.parallel.vocab import VocabShard
from marlhf_mega.rollout.drawing import draw
from marlhf_mega.rollout.sampling import SamplingRule

GROUP = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
SHARD = VocabShard(group=GROUP, start=0, num_real=4, num_total=4)


def decoder(logits):
    """Gives these logits, whatever the states."""
    rows = torch.tensor(logits)
    return SimpleNamespace(logits=lambda hidden: rows, chunk=SimpleNamespace(vocab_shard=SHARD))


def test_a_message_has_token_log_prob_and_the_one_before_filters():
    """Logits 2 1 0 -1: top-k 2 keeps the first two, of 0.731 and 0.269."""
    rule = SamplingRule(temperature=1.0, top_k=2, record_kept=True)
    rows = [decoder([[2.0, 1.0, 0.0, -1.0]] * 2)]
    columns, kept = draw(rows, [torch.zeros(2, 8)], torch.tensor([0.1, 0.9]).double(), rule)
    assert columns.dtype == torch.float64
    assert columns[0].tolist() == [0, 1]
    assert columns[1].tolist() == pytest.approx([-0.313262, -1.313262], abs=1e-6)
    assert columns[2].tolist() == pytest.approx([-0.440190, -1.440190], abs=1e-6)
    assert kept.shape[0] == 2


def test_a_second_model_has_its_say():
    """Halfway between [0 4] and [4 0] all is even; without a rule for it the second is not read."""
    first, second = decoder([[0.0, 4.0, -99.0, -99.0]]), decoder([[4.0, 0.0, -99.0, -99.0]])
    hidden, number = [torch.zeros(1, 8)] * 2, torch.tensor([0.4]).double()
    mixed, kept = draw([first, second], hidden, number, SamplingRule(temperature=1.0, mixture=0.5))
    assert mixed[:, 0].tolist() == pytest.approx([0, -0.693147, -0.693147], abs=1e-6)
    assert kept is None
    alone, _ = draw([first, second], hidden, number, SamplingRule(temperature=1.0))
    assert alone[0].tolist() == [1]
