"""Slot coverage of E2E NLG restaurant descriptions, the rule reward of the E2E configs."""

import re
from collections.abc import Mapping

_SLOT = re.compile(r"(?:^|, )([^\[\],]+)\[([^\]]*)\]")
_FAMILY_FRIENDLY = re.compile(r"famil|kid|child")


def parse_slots(prompt: str) -> dict[str, str]:
    """Parse a meaning representation such as `name[Aromi], food[English]`.

    Raises:
        ValueError: the prompt has no `slot[value]`.
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

    A value counts if it occurs literally, ignoring case. `familyFriendly[yes|no]` has no literal
    form in a sentence: it counts if families, kids or children are mentioned at all.

    Args:
        prompt: the meaning representation, used if `slots` is None.
        response: the sentence to score.
        slots: slot name -> value, the `slots` field of the data row.

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
