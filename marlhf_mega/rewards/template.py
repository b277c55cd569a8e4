"""What reward models read that are given more than prompt and response: rendered templates."""

from collections.abc import Mapping, Sequence
from typing import Any

from marlhf_mega.config.sections.reward import RewardSource


def fill_template(
    judge: RewardSource, responses: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[str | None], list[str]]:
    """Put prompts, responses and other fields of the data rows into a judge's template.

    SALMON (arXiv 2310.05910) shows its reward model the principles; RLBFF (arXiv 2509.21319) asks
    whether a response satisfies one.

    Args:
        judge: has a template.
        responses: text of each response.
        rows: data row of each, with the prompt's text as `prompt`; a field that is a list has a
            line for each of its items.

    Returns:
        The texts, None where the row lacks a field; and a reason for each of those.
    """
    assert judge.template is not None
    texts: list[str | None] = []
    errors = []
    for response, row in zip(responses, rows, strict=True):
        fields = {**row, "response": response}
        missing = [name for name in judge.template_fields if fields.get(name) is None]
        if missing:
            errors.append(f"the data row has no field {missing[0]} for the template")
            texts.append(None)
            continue
        texts.append(
            judge.template.format_map({n: _text(fields[n]) for n in judge.template_fields})
        )
    return texts, errors


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
