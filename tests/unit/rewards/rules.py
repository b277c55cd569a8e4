"""Reward functions that behave well or badly; run by the rule's process."""

import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path


def num_words(prompt: str, response: str) -> float:
    return len(response.split())


def matches(prompt: str, response: str, reference: str, *, weight: float = 1.0) -> float:
    return weight * (response == reference)


def num_fields(prompt: str, response: str, **fields: object) -> int:
    return len(fields)


RETURNED = {
    "nan": math.nan,
    "inf": -math.inf,
    "too large for float32": 1e300,
    "text": "1.0",
    "none": None,
}


def misbehave(prompt: str, response: str) -> object:
    match response:
        case "raise":
            raise KeyError("no such slot\nsecond line")
        case "exit":
            sys.exit(3)
        case "die":
            os._exit(7)
        case "hang":
            while True:
                pass
        case "hang in C":
            return len(re.findall(r"(a+)+$", "a" * 60 + "b"))
        case "print":
            print('{"score": 99}', flush=True)
            return 2.0
        case "read":
            return len(sys.stdin.read())
        case "count calls":
            misbehave.calls = getattr(misbehave, "calls", 0) + 1
            return misbehave.calls
    return RETURNED.get(response, 1.0)


def hang_with_child(prompt: str, response: str) -> float:
    """Write the process ids of this process and of a child of it to the file named by `prompt`."""
    child = subprocess.Popen(["sleep", "600"])
    Path(prompt).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)
    return 0.0


not_a_function = 3
