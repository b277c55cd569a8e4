"""Chat messages of a row: their form, and preferences whose answers are messages."""

from collections.abc import Sequence
from typing import Any


def check_messages(messages: object, *, name: str, where: str) -> None:
    """Refuse what is not a list of objects with texts role and content.

    Raises:
        ValueError: with file, line and field.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{where}: {name}: must be {'' if name == 'messages' else 'text or '}a list of chat "
            f"messages; got {type_name(messages)}."
        )
    for index, message in enumerate(messages):
        fields = ("role", "content")
        if not isinstance(message, dict) or not all(
            isinstance(message.get(field), str) for field in fields
        ):
            raise ValueError(
                f"{where}: {name}[{index}]: must be an object with texts role and content; "
                f"got {message!r:.80}."
            )


def check_conversation(messages: object, *, where: str) -> None:
    """Refuse what is not a chat that ends with an answer of the assistant.

    Raises:
        ValueError: with file and line.
    """
    check_messages(messages, name="messages", where=where)
    assert isinstance(messages, list)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages[-3:])
        raise ValueError(
            f"{where}: messages: must be a chat that ends with an answer of the assistant; its "
            f"last roles are: {roles}. Fix the row."
        )


def with_text_answers(row: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Turn a preference whose answers are message lists into messages and two texts.

    Each list is the assistant's answer alone, or the conversation up to it; without a prompt, the
    messages that both begin with are the prompt.

    Raises:
        ValueError: with file, line and field; the lists do not end in one answer each to the same
            messages.
    """
    names = ("chosen", "rejected")
    if not any(isinstance(row.get(name), list) for name in names):
        return row
    for name in names:
        check_messages(row.get(name), name=name, where=where)
    asked: list[Any] = []
    for name in names:
        *before, answer = row[name]
        if answer["role"] != "assistant":
            raise ValueError(
                f"{where}: {name}: must end with an assistant message; its last role is "
                f"{answer['role']}. Fix the row."
            )
        asked.append(before)
    prompt = row.get("prompt")
    if prompt is None or (isinstance(prompt, str) and [prompt] == _contents(asked[0])):
        prompt = asked[0]
    if not isinstance(prompt, list) or not prompt or any(a not in ([], prompt) for a in asked):
        raise ValueError(
            f"{where}: prompt: must be the messages that chosen and rejected answer with one "
            f"message each; got {prompt!r:.80}. Fix the row."
        )
    return row | {"prompt": prompt} | {name: row[name][-1]["content"] for name in names}


def _contents(messages: Sequence[Any]) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "user"]


def type_name(value: object) -> str:
    """Name the type of a JSON value."""
    match value:
        case None:
            return "null"
        case dict():
            return "an object"
        case []:
            return "an empty list"
        case list():
            return "a list"
        case str():
            return "text"
    return f"{value!r:.40}"
