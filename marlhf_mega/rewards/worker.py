"""The process that runs a user's reward function; started by `rule.py`, does not import torch.

It exchanges JSON, one object per line, over its original standard input and output. The function's
own prints go to standard error.

    out  {"ready": parameters, null for all} or {"error": reason}    once, after the import
    in   {"samples": [{"prompt", "response", "fields"}]}             a chunk
    out  {"score": number} or {"error": reason}                      one per sample, immediately

A function with an attribute `seconds_needed(fields) -> float` says how long a sample may take; then
`{"needs": seconds}` comes before the sample's answer.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any, TextIO

from marlhf_mega.lifeline import die_with_parent
from marlhf_mega.user_code import load_function

MAX_REASON = 200
"""Characters of a reason, so that the answers to a chunk fit into a pipe."""


def main(source: str, parent: int) -> None:
    """Import the function, then answer chunks until the input ends."""
    die_with_parent(parent)
    requests, answers = _take_over_standard_streams()
    try:
        function: Callable[..., Any] = load_function(source)
    except BaseException as error:  # noqa: BLE001 the user's module may raise anything
        _send(answers, {"error": _reason(error)})
        return
    accepted = _accepted_fields(function)
    _send(answers, {"ready": None if accepted is None else sorted(accepted)})
    for line in requests:
        for sample in json.loads(line)["samples"]:
            needed = _seconds_needed(function, sample["fields"])
            if needed is not None:
                _send(answers, {"needs": needed})
            _send(answers, _score(function, accepted, sample))


def _seconds_needed(function: Callable[..., Any], fields: dict[str, Any]) -> float | None:
    needed = getattr(function, "seconds_needed", None)
    try:
        return None if needed is None else float(needed(fields))
    except Exception:  # noqa: BLE001 the row is wrong, which the function itself will say
        return None


def _score(
    function: Callable[..., Any], accepted: set[str] | None, sample: dict[str, Any]
) -> dict[str, Any]:
    fields = sample["fields"]
    if accepted is not None:
        fields = {name: value for name, value in fields.items() if name in accepted}
    try:
        score = function(sample["prompt"], sample["response"], **fields)
        if not isinstance(score, Real):
            return {"error": f"returned {type(score).__name__}, not a number"}
        return {"score": float(score)}
    except (Exception, SystemExit) as error:  # noqa: BLE001 the user's function may raise anything
        return {"error": f"raised {_reason(error)}"}


def _accepted_fields(function: Callable[..., Any]) -> set[str] | None:
    """Return the fields that are parameters of the function; None means all, by `**fields`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions written in C have no signature
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_name = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return {parameter.name for parameter in list(parameters)[2:] if parameter.kind in by_name}


def _reason(error: BaseException) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}"[:MAX_REASON]


def _take_over_standard_streams() -> tuple[TextIO, TextIO]:
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull) as nothing:  # noqa: PTH123 a descriptor is wanted
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return requests, answers


def _send(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
