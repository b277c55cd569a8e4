"""A reward from an HTTP server. Samples that it fails to score are masked."""

import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from numbers import Real
from typing import Any
from urllib.parse import urlsplit

import torch

from marlhf_mega.rewards.scores import Scores, other_fields

BATCH = 64
"""Responses per request."""

NUM_CONNECTIONS = 4
"""Concurrent requests."""

NUM_TRIES = 3
"""Attempts per request, including the first."""

BACKOFF_SECONDS = 0.5
"""Pause before the second attempt; it doubles before every further one."""

MAX_ANSWER_BYTES = 16 << 20

TOKEN_VARIABLE = "MARLHF_REWARD_TOKEN"
"""Environment variable with the bearer token, if the server needs one."""


class HttpReward:
    """Scores responses by POST requests to one address.

    request   {"prompts": [text], "responses": [text], "rows": [the other fields of each data row]}
    response  {"scores": [number, or null for no score]}, in order

    Refused connections, time-outs and the statuses 429 and 5xx are retried, up to `NUM_TRIES`
    attempts. Any other failure leaves the samples of that request without a score. Redirects are
    not followed, since they could send the token to another server.
    """

    def __init__(self, source: str, *, timeout_seconds: float = 10.0) -> None:
        """Set the address; sends nothing.

        Args:
            source: `http://` or `https://` address.
            timeout_seconds: time limit for one request, until its answer has arrived completely.
        """
        self._source = source
        self._timeout = timeout_seconds

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        rows: Sequence[Mapping[str, Any]],
    ) -> Scores:
        """Score a batch, in order.

        Args:
            prompts: text of each prompt.
            responses: text of each response.
            rows: data row of each prompt; values that JSON cannot represent (such as dates) are
                sent as text.
        """
        starts = range(0, len(responses), BATCH)
        bodies = [
            json.dumps(
                {
                    "prompts": prompts[start : start + BATCH],
                    "responses": responses[start : start + BATCH],
                    "rows": [other_fields(row) for row in rows[start : start + BATCH]],
                },
                default=str,
            ).encode()
            for start in starts
        ]
        sizes = [min(BATCH, len(responses) - start) for start in starts]
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            answers = [x for batch in pool.map(self._answers, bodies, sizes) for x in batch]
        values = torch.tensor([x if isinstance(x, float) else 0.0 for x in answers])
        valid = torch.tensor([isinstance(x, float) for x in answers], dtype=torch.bool)
        valid &= values.isfinite()
        errors = [
            x if isinstance(x, str) else f"the server's score is {x}"
            for x, is_valid in zip(answers, valid.tolist(), strict=True)
            if not is_valid
        ]
        return Scores(torch.where(valid, values, 0.0), valid, errors)

    def close(self) -> None:
        """Do nothing: no connection stays open between batches."""

    def _answers(self, body: bytes, size: int) -> list[float | str]:
        """Return a score or a reason for each sample of one request."""
        for attempt in range(NUM_TRIES):
            if attempt:
                time.sleep(BACKOFF_SECONDS * 2 ** (attempt - 1))
            try:
                status, answer = self._post(body)
            except (OSError, HTTPException) as error:
                problem = f"the server did not answer: {type(error).__name__}: {error}"
                continue
            if status == 200:
                return _scores(answer, size)
            problem = f"the server answered with status {status}"
            if status != 429 and status < 500:
                break
        return [problem] * size

    def _post(self, body: bytes) -> tuple[int, bytes]:
        """Send one request; raises OSError or HTTPException if it fails or takes too long."""
        url = urlsplit(self._source)
        assert url.hostname is not None
        kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
        connection = kind(url.hostname, url.port, timeout=self._timeout)
        headers = {"Content-Type": "application/json"}
        if token := os.environ.get(TOKEN_VARIABLE):
            headers["Authorization"] = f"Bearer {token}"
        deadline = time.monotonic() + self._timeout
        connection.connect()
        # The connection's own time limit applies to each read: a slow trickle never exceeds it.
        clock = threading.Timer(deadline - time.monotonic(), _hang_up, [connection.sock])
        clock.daemon = True
        clock.start()
        try:
            path = (url.path or "/") + (f"?{url.query}" if url.query else "")
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER_BYTES)
        finally:
            clock.cancel()
            connection.close()
        if time.monotonic() > deadline:
            raise TimeoutError(f"took longer than {self._timeout:g} s")
        return response.status, answer


def _hang_up(connected: socket.socket) -> None:
    """Shut the connection down, which wakes up the thread that reads from it."""
    try:
        connected.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is closed already


def _scores(answer: bytes, size: int) -> list[float | str]:
    """Parse the answer; a sample without a score gets the reason instead."""
    try:
        parsed = json.loads(answer)
    except (ValueError, RecursionError):  # thousands of brackets
        return ["the server's answer is not JSON"] * size
    scores = parsed.get("scores") if isinstance(parsed, dict) else None
    if not isinstance(scores, list):
        return ['the server\'s answer has no list "scores"'] * size
    if len(scores) != size:
        return [f"the server sent {len(scores)} scores for {size} responses"] * size
    return [_score(score) for score in scores]


def _score(score: object) -> float | str:
    if not isinstance(score, Real) or isinstance(score, bool):
        return f"the server's score is {type(score).__name__}, not a number"
    try:
        return float(score)
    except OverflowError:  # hundreds of digits
        return "the server's score is too large"
