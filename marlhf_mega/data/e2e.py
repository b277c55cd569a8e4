"""Slot coverage of E2E NLG restaurant descriptions: the rule reward of the E2E configs."""

import re
from collections.abc import Mapping

_SLOT = re.compile(r"(?:^|, )([^\[\],]+)\[([^\]]*)\]")
_FAMILY_FRIENDLY = re.compile(r"famil|kid|child")


def parse_slots(prompt: str) -> dict[str, str]:
    """Read a meaning representation such as `name[Aromi], food[English]` into a dictionary.

    Raises:
        ValueError: when the prompt holds no `slot[value]` at all.
    """
    slots = dict(_SLOT.findall(prompt))
    if not slots:
        raise ValueError(
            f"prompt={prompt[:60]!r}: must be a meaning representation; found no slot[value]. "
            "Use prompts such as 'name[Aromi], food[English]'."
        )
    return slots


def slot_coverage(
    prompt: str, response: str, slots: Mapping[str, str] | None = None, **_fields: object
) -> float:
    """Compute the fraction of requested slot values that the response mentions.

    A value counts when it occurs literally, ignoring case. `familyFriendly[yes|no]` has no
    literal form in a sentence: it counts when families, kids or children are mentioned at all.

    Args:
        prompt: meaning representation, used when `slots` is not given.
        response: the sentence to judge.
        slots: slot name to value, as in the `slots` field of the data set.

    Returns:
        Coverage in [0, 1].
    """
    slots = slots or parse_slots(prompt)
    text = response.lower()
    mentioned = [
        _FAMILY_FRIENDLY.search(text) is not None
        if name == "familyFriendly"
        else value.lower() in text
        for name, value in slots.items()
    ]
    return sum(mentioned) / len(mentioned)
