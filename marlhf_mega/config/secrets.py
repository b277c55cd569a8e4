"""Secrets stay in the environment: never in configurations, redacted in logs."""

import logging
import os
import re
from collections.abc import Iterator

_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|(API|ACCESS|PRIVATE|SECRET)_?KEY|CREDENTIALS?)(_|$)",
    re.IGNORECASE,
)
"""Whole words of a name: TOKENIZERS_PARALLELISM and MAX_TOKENS are no secrets."""

MIN_LENGTH = 6
"""Shorter values are not redacted: to hide every `1` would make logs unreadable."""


def secrets() -> Iterator[tuple[str, str]]:
    """Yield name and value of environment variables that look like secrets."""
    for name, value in os.environ.items():
        if _NAME.search(name) and len(value) >= MIN_LENGTH and not _is_number(value):
            yield name, value


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def redact(text: str) -> str:
    """Replace every secret in a text by `<NAME>`."""
    for name, value in secrets():
        text = text.replace(value, f"<{name}>")
    return text


class RedactingFormatter(logging.Formatter):
    """Formats log records and tracebacks without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the redacted line."""
        return redact(super().format(record))
