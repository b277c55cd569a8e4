"""Responses cut by the rule of the configuration, on text."""

import pytest
import torch

from marlhf_mega.config.sections.hardware import ParallelConfig
from marlhf_mega.config.sections.rollout import MacroConfig
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.experience.segmentation import Segmenter, TokenEvidence
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.rollout.types import Rollout

TEXTS = ["Bring one red apple. Do not forget it! And then", "Bring one.", "No end here at all"]


@pytest.fixture(scope="module")
def tokenizer(job_files):
    return Tokenizer.load(job_files / "tok")


@pytest.fixture(scope="module")
def mesh():
    yield create_mesh(ParallelConfig())
    destroy_mesh()


def rollout_of(responses, indices):
    width = max(map(len, responses))
    return Rollout(
        prompts=[[1]] * len(responses),
        responses=responses,
        finished=[True] * len(responses),
        sample_indices=list(indices),
        logprobs=torch.zeros(len(responses), width),
    )


@pytest.fixture
def cut(tokenizer, mesh):
    """Cut responses; return each one's actions as lists of token ids, and the fallbacks."""

    def segment(responses, indices=None, *, step=0, seed=0, **settings):
        rollout = rollout_of(responses, indices or range(len(responses)))
        mask = rollout.response_mask(torch.device("cpu"))
        # Log-probs and entropies that are functions of each token, for the rules that read them.
        logprobs = torch.zeros(mask.shape)
        logprobs[mask] = -torch.tensor([t for r in responses for t in r]).float().sqrt()
        evidence = TokenEvidence(
            old_logprobs=logprobs / 10, ref_logprobs=logprobs, entropy=logprobs.cos()
        )
        segmenter = Segmenter(MacroConfig(**settings), tokenizer, mesh, seed=seed)
        actions, num_fallbacks = segmenter.segment(rollout, mask, evidence, step=step)
        found = []
        for response, ids in zip(responses, actions.ids, strict=True):
            count = int(ids.max()) + 1
            found.append(
                [[t for t, i in zip(response, ids, strict=False) if i == n] for n in range(count)]
            )
        return found, num_fallbacks

    return segment


def with_eos(tokenizer, texts):
    return [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]


def flat(actions):
    return [token for action in actions for token in action]


def as_text(tokenizer, actions):
    return [[tokenizer.decode(action).strip() for action in response] for response in actions]


def test_sentences_are_actions(tokenizer, cut):
    found, _ = cut(with_eos(tokenizer, TEXTS), rule="sentence")
    assert as_text(tokenizer, found) == [
        ["Bring one red apple.", "Do not forget it!", "And then"],
        ["Bring one."],
        ["No end here at all"],
    ]


def test_the_end_token_joins_or_stands_alone(tokenizer, cut):
    (joined,), _ = cut(with_eos(tokenizer, TEXTS[1:2]), rule="whole_response")
    (alone,), _ = cut(with_eos(tokenizer, TEXTS[1:2]), rule="whole_response", eos="own")
    assert joined == [[*alone[0], tokenizer.eos_id]]
    assert alone[1] == [tokenizer.eos_id]


class Broken:
    def parse(self, text):
        return []


def test_phrases_are_actions_and_what_cannot_be_parsed_is_counted(tokenizer, cut):
    responses = with_eos(tokenizer, ["The small dog sees a red apple on the table.", *TEXTS])
    found, num_fallbacks = cut(responses, rule="parsing", cutoff=12)
    assert num_fallbacks == 0
    # (S (CLAUSE (NP The small dog) (VP (VP sees) (NP a red apple) (PP on the table))) .)
    assert as_text(tokenizer, found[:1]) == [["The small dog sees", "a red apple", "on the table."]]
    broken, num_broken = cut(responses, rule="parsing", cutoff=4, parser=f"{__name__}:Broken")
    assert num_broken == 4
    # Every 4 tokens; the end token joins the last.
    assert {len(action) for response in broken for action in response[:-1]} == {4}


RULES = [
    {"rule": "token"},
    {"rule": "fixed_ngram", "n": 3},
    {"rule": "random_ngram"},
    {"rule": "perplexity"},
    {"rule": "probability", "probability": 0.3},
    {"rule": "entropy"},
    {"rule": "sentence"},
    {"rule": "whole_response"},
    {"rule": "parsing"},
]


@pytest.mark.parametrize("settings", RULES, ids=lambda settings: settings["rule"])
def test_a_response_is_cut_alike_whoever_is_in_its_batch(tokenizer, cut, settings):
    """Else a run would depend on the number of data-parallel ranks."""
    responses = with_eos(tokenizer, TEXTS)
    together, _ = cut(responses, [7, 3, 5], **settings)
    for response, index, wanted in zip(responses, [7, 3, 5], together, strict=True):
        (alone,), _ = cut([response], [index], **settings)
        assert alone == wanted
        assert flat(alone) == response


def test_random_lengths_are_drawn_anew_for_every_sample_step_and_seed(cut):
    response = list(range(5, 65))
    draws = [
        cut([response], [index], step=step, seed=seed, rule="random_ngram")[0][0]
        for index, step, seed in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))
    ]
    lengths = [tuple(map(len, draw)) for draw in draws]
    assert len(set(lengths)) == 4
    assert lengths[0] == lengths[4]
    assert {n for draw in lengths for n in draw[:-1]} == {2, 3, 5, 10}
