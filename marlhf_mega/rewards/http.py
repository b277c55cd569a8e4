"""A server as a reward: batches of responses go out, scores come back, failures mask samples."""

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

from marlhf_mega.rewards.rule import Scores

BATCH = 64
"""Responses per request."""

NUM_CONNECTIONS = 4
"""Requests under way at a time."""

NUM_TRIES = 3
"""Of one request, the first included."""

BACKOFF_SECONDS = 0.5
"""Before the second try; twice as long before each further one."""

MAX_ANSWER_BYTES = 16 << 20

TOKEN_VARIABLE = "MARLHF_REWARD_TOKEN"
"""Environment variable with the bearer token, if the server wants one."""


class HttpReward:
    """Scores responses by POST requests to one address.

    out  {"prompts": [text], "responses": [text], "rows": [the other fields of each row]}
    in   {"scores": [number, or null where there is none]}, in order

    Refused connections, time-outs and the statuses 429 and 5xx are tried again, `NUM_TRIES` times
    in all; whatever else is wrong leaves the samples of that request without a score. Redirects
    are not followed: they would carry the token elsewhere.
    """

    def __init__(self, source: str, *, timeout_seconds: float = 10.0) -> None:
        """Remember the address; nothing is sent.

        Args:
            source: `http://` or `https://` address.
            timeout_seconds: for one request from its start to the end of its answer.
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
            rows: fields of each prompt's row; what JSON cannot hold (dates, say) goes as text.
        """
        others = [
            {name: value for name, value in row.items() if name not in ("prompt", "response")}
            for row in rows
        ]
        starts = range(0, len(responses), BATCH)
        bodies = [
            json.dumps(
                {
                    "prompts": prompts[start : start + BATCH],
                    "responses": responses[start : start + BATCH],
                    "rows": others[start : start + BATCH],
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
        """Nothing stays open between batches."""

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
        # The connection's own limit is for one read: a server that drips would never reach it.
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
    """Wake up whoever reads from the connection."""
    try:
        connected.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has ended by itself


def _scores(answer: bytes, size: int) -> list[float | str]:
    """Check the answer; a sample without a number gets the reason instead."""
    try:
        parsed = json.loads(answer)
    except ValueError:
        return ["the server's answer is not JSON"] * size
    scores = parsed.get("scores") if isinstance(parsed, dict) else None
    if not isinstance(scores, list):
        return ['the server\'s answer has no list "scores"'] * size
    if len(scores) != size:
        return [f"the server sent {len(scores)} scores for {size} responses"] * size
    return [
        float(score)
        if isinstance(score, Real) and not isinstance(score, bool)
        else f"the server's score is {type(score).__name__}, not a number"
        for score in scores
    ]
