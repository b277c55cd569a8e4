"""The process that runs a user's reward function; started by `rule.py`, imports no torch.

It speaks JSON, one object per line, over the descriptors that were its standard input and output:
the function's own prints go to standard error.

    out  {"ready": fields it takes} or {"error": reason} once, after the import; null: all fields
    in   {"rows": [{"prompt", "response", "fields"}]}    a chunk
    out  {"score": number} or {"error": reason}          one per row, as soon as it is known
"""

import ctypes
import importlib
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any, TextIO

MAX_REASON = 200
"""Characters of a reason; with it the answers to a chunk fit into a pipe."""

PR_SET_PDEATHSIG = 1


def main(source: str, parent: int) -> None:
    """Import the function, then answer chunks until the input ends."""
    _die_with(parent)
    requests, answers = _take_over_standard_streams()
    try:
        function = _import(source)
    except BaseException as error:  # noqa: BLE001 the user's module may raise anything
        _send(answers, {"error": _reason(error)})
        return
    accepted = _accepted_fields(function)
    _send(answers, {"ready": None if accepted is None else sorted(accepted)})
    for line in requests:
        for row in json.loads(line)["rows"]:
            _send(answers, _score(function, accepted, row))


def _score(
    function: Callable[..., Any], accepted: set[str] | None, row: dict[str, Any]
) -> dict[str, Any]:
    fields = row["fields"]
    if accepted is not None:
        fields = {name: value for name, value in fields.items() if name in accepted}
    try:
        score = function(row["prompt"], row["response"], **fields)
        if not isinstance(score, Real):
            return {"error": f"returned {type(score).__name__}, not a number"}
        return {"score": float(score)}
    except (Exception, SystemExit) as error:  # noqa: BLE001 the user's function may raise anything
        return {"error": f"raised {_reason(error)}"}


def _import(source: str) -> Callable[..., Any]:
    module, _, name = source.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is {type(function).__name__}, not a function")
    return function


def _accepted_fields(function: Callable[..., Any]) -> set[str] | None:
    """Names of the row's fields the function takes; none: all of them, by `**fields`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions written in C do not tell
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


def _die_with(parent: int) -> None:
    """Ask Linux to kill this process with its parent, even in the middle of an endless loop."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent was gone before the line above
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
