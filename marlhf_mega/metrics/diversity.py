"""How different responses are: distinct n-grams, and BLEU against each other.

Diversity is of the samples of one prompt (per input, mean over prompts), or of one sample of every
prompt (cross input), as in Kirk et al. 2024 (arXiv 2310.06452).
"""

import importlib.util
import math
from collections.abc import Sequence
from statistics import fmean

MAX_TEXTS = 64
"""For `self_bleu`, whose time grows with the square of their number: the first ones."""
SIZES = (1, 2, 3)
"""Tokens of the n-grams that are counted."""


def distinct(responses: Sequence[Sequence[int]], n: int) -> float:
    """Return distinct-n: different n-grams over all n-grams (Li et al. 2016, arXiv 1510.03055).

    Args:
        responses: token ids of each.
        n: tokens of an n-gram.

    Returns:
        From near 0, all the same, to 1; NaN without any n-gram.
    """
    grams = [tuple(r[i : i + n]) for r in responses for i in range(len(r) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(texts: Sequence[str]) -> float:
    """Return the mean BLEU of each text against the others (Zhu et al. 2018, arXiv 1802.01886).

    Sentence BLEU of sacrebleu with its defaults, of the first `MAX_TEXTS`, from 0 to 1; 1 if all
    texts are the same.
    """
    from sacrebleu import sentence_bleu  # an extra

    texts = texts[:MAX_TEXTS]
    return fmean(
        sentence_bleu(text, [*texts[:place], *texts[place + 1 :]]).score / 100
        for place, text in enumerate(texts)
    )


def diversity(
    responses: Sequence[Sequence[int]], texts: Sequence[str] | None, group: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return what each measure gives for every prompt, and across prompts if there are several.

    Args:
        responses: token ids of each, `group` neighbours to one prompt.
        texts: the same as text, for `self_bleu`; None leaves it out.
        group: responses to each prompt.
    """
    starts = range(0, len(responses), group)
    parts = [slice(start, start + group) for start in starts]
    each = [_measured(responses[part], texts and texts[part]) for part in parts]
    values = {f"eval/{name}_per_input": [found[name] for found in each] for name in each[0]}
    first = slice(None, None, group)
    across = _measured(responses[first], texts and texts[first]) if len(parts) > 1 else {}
    return values, {f"eval/{name}_cross_input": value for name, value in across.items()}


def _measured(responses: Sequence[Sequence[int]], texts: Sequence[str] | None) -> dict[str, float]:
    found = {f"distinct_{n}": distinct(responses, n) for n in SIZES}
    return found if texts is None else found | {"self_bleu": self_bleu(texts)}


def check_self_bleu(wanted: bool) -> None:
    """Check that sacrebleu is installed if a run is to use it.

    Raises:
        ValueError: the package is not installed.
    """
    if wanted and importlib.util.find_spec("sacrebleu") is None:
        raise ValueError(
            "evaluate.self_bleu=true: needs the sacrebleu package; it is not installed. "
            "Run `pip install marlhf-mega[bleu]` or set it to false."
        )
