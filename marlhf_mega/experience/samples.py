"""Samples for people: prompts and responses as text, with scores and macro actions."""

import math
from collections.abc import Sequence

from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.experience.types import Details, Experience
from marlhf_mega.metrics.writers import Action, Sample
from marlhf_mega.rollout.types import Rollout


def experience_samples(
    prompts: Sequence[str],
    rollout: Rollout,
    experience: Experience,
    details: Details,
    tokenizer: Tokenizer,
) -> list[Sample]:
    """Return the first samples of an experience.

    Args:
        prompts: as text; so many samples are made.
        rollout: of this replica.
        experience: made of the rollout.
        details: of the experience.
        tokenizer: of the run.
    """
    actions = experience_actions(experience, details)
    samples = []
    for i, prompt in enumerate(prompts):
        has_score = not math.isnan(details.scores[i].item())
        sample = make_sample(
            rollout.sample_indices[i],
            prompt,
            experience.responses[i],
            tokenizer,
            actions=actions[i],
            score=details.scores[i].item(),
            shaped=details.shaped[i].item() if has_score else None,
            kl=details.kl[i].sum().item() if has_score and details.kl is not None else None,
        )
        samples.append(sample)
    return samples


def experience_actions(experience: Experience, details: Details) -> list[list[Action]]:
    """Return the macro actions of every response; none where there is no score."""
    actions = experience.actions
    # All tokens of an action have its advantage, but for `sae`: there it is their mean.
    advantages = actions.pool(experience.advantages) / actions.lengths.clamp(min=1)
    blank = [[None] * actions.lengths.size(1)] * len(actions.lengths)
    values = blank if details.values is None else details.values.tolist()
    kl = blank if details.kl is None else actions.pool(details.kl).tolist()
    rows = zip(actions.lengths.tolist(), advantages.tolist(), values, kl, strict=True)
    return [_row_actions(*row) for row in rows]


def _row_actions(
    lengths: list[int],
    advantages: list[float],
    values: list[float | None],
    kl: list[float | None],
) -> list[Action]:
    found, start = [], 0
    for length, advantage, value, divergence in zip(lengths, advantages, values, kl, strict=True):
        if length:
            found.append(
                Action(start=start, length=length, advantage=advantage, value=value, kl=divergence)
            )
        start += length
    return found


def make_sample(
    index: int,
    prompt: str,
    response: Sequence[int],
    tokenizer: Tokenizer,
    *,
    actions: Sequence[Action] = (),
    score: float | None = None,
    shaped: float | None = None,
    gold: float | None = None,
    kl: float | None = None,
) -> Sample:
    """Turn token ids into the texts that people read."""
    text, spans = tokenizer.decode(response), tokenizer.offsets(response)
    tokens, shown = [], 0
    for start, end in spans:
        # Several tokens may share a character: the first one shows it.
        tokens.append(text[max(start, shown) : end])
        shown = max(shown, end)

    def known(value: float | None) -> float | None:
        return None if value is None or math.isnan(value) else value

    return Sample(
        id=index,
        prompt=prompt,
        tokens=tokens,
        end=tokenizer.end_text(response),
        actions=list(actions),
        score=known(score),
        shaped=known(shaped),
        gold=known(gold),
        kl=known(kl),
    )
