"""Distinct n-grams and self-BLEU: by hand, and by a loop."""

import importlib.util
import math

import pytest

from marlhf_mega.metrics.diversity import check_self_bleu, distinct, diversity, self_bleu


def test_distinct_counts_different_ngrams_among_all() -> None:
    responses = [[1, 2, 3], [1, 2, 4]]
    assert [distinct(responses, n) for n in (1, 2, 3)] == [4 / 6, 3 / 4, 1.0]
    assert distinct([[7, 7, 7, 7]], 2) == 1 / 3
    assert math.isnan(distinct([[], [1]], 2))


def test_diversity_is_that_of_each_prompt_and_that_across_prompts() -> None:
    """Two responses to each of three prompts, one of which has no pair of tokens."""
    responses = [[1, 2, 3], [1, 2, 3], [1, 2], [4, 5], [6], [6]]
    values, across = diversity(responses, None, 2)
    assert values["eval/distinct_1_per_input"] == [0.5, 1.0, 0.5]
    assert values["eval/distinct_2_per_input"][:2] == [0.5, 1.0]
    assert math.isnan(values["eval/distinct_2_per_input"][2])
    # 1 2 3, 1 2 and 6: four of six tokens differ, two of three pairs.
    assert across["eval/distinct_1_cross_input"] == 4 / 6
    assert across["eval/distinct_2_cross_input"] == 2 / 3
    assert diversity(responses[:2], None, 2)[1] == {}


def test_self_bleu_is_the_mean_of_each_against_the_others() -> None:
    """Of five words four are right: precisions 4/5, 3/4, 2/3 and 1/2."""
    pytest.importorskip("sacrebleu")
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx(0.2**0.25, abs=1e-9)
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1.0, abs=1e-9)
    assert self_bleu([*["a b c d e"] * 64, "p q r s t"]) == pytest.approx(1.0, abs=1e-9)
    texts = ["a b c d e", "a b c d f", "p q r s t", "p q r s t"]
    values, across = diversity([text.split() for text in texts], texts, 2)
    assert values["eval/self_bleu_per_input"] == pytest.approx([0.2**0.25, 1.0], abs=1e-9)
    assert across["eval/self_bleu_cross_input"] < 0.1


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the sacrebleu package.*marlhf-mega\[bleu\]"):
        check_self_bleu(True)
    check_self_bleu(False)
