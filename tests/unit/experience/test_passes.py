"""What models say of responses, and what follows from it alone."""

import torch

from marlhf_mega.experience.passes import Passes

FULL = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]])
REFERENCE = torch.tensor([[-1.5, -1.0], [-0.5, -9.0]])
MASK = torch.tensor([[True, True], [True, False]])


def passes(**more):
    nothing = dict.fromkeys(("entropy", "ref_logprobs", "values", "dense"))
    return Passes(**nothing | {"old_logprobs": FULL - 1, "full_logprobs": FULL} | more)


def test_the_divergence_compares_what_filters_have_not_touched():
    found = passes(ref_logprobs=REFERENCE).divergence(MASK)
    assert found.tolist() == [[0.5, -1.0], [0.0, 0.0]]
    assert passes().divergence(MASK) is None


def test_only_what_is_there_counts():
    values = torch.zeros(2, 2)
    assert len(passes().grids) == 2
    assert passes(values=values).grids[-1] is values


def test_macro_rules_read_what_the_policy_says_under_filters():
    evidence = passes(ref_logprobs=REFERENCE).evidence
    assert torch.equal(evidence.old_logprobs, FULL - 1)
    assert evidence.ref_logprobs is REFERENCE
    assert evidence.entropy is None
