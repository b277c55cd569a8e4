"""Secrets live in the environment only: kept out of configurations, blotted out of logs."""

import logging
import os
import re
from collections.abc import Iterator

_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)

MIN_LENGTH = 6
"""Shorter values are left alone: blotting out every `1` would hide more than a secret."""


def secrets() -> Iterator[tuple[str, str]]:
    """Yield name and value of the environment variables that look like secrets."""
    for name, value in os.environ.items():
        if _NAME.search(name) and len(value) >= MIN_LENGTH:
            yield name, value


def redact(text: str) -> str:
    """Replace every secret in a text by `<NAME>`."""
    for name, value in secrets():
        text = text.replace(value, f"<{name}>")
    return text


class RedactingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return redact(super().format(record))
