"""A Python function as a reward, run in a separate process so that it cannot harm the run."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from marlhf_mega.rewards.sandbox import SandboxMode, sandbox_problem
from marlhf_mega.rewards.scores import Scores, other_fields

START_SECONDS = 60.0
"""Time to import the function's module; heavy imports are slow on cold disks."""

CHUNK = 64
"""Samples per request: enough to be cheap, few enough for the answers to fit into a pipe."""


class RuleReward:
    """Scores responses by `function(prompt, response, **row_fields) -> number`.

    A call that raises, exceeds the time limit, kills its process or returns anything but a finite
    number leaves that one sample without a score. The process is restarted after a time-out.
    """

    def __init__(
        self,
        source: str,
        *,
        timeout_seconds: float = 10.0,
        sandbox: SandboxMode = "namespaces",
        key: str = "reward.source",
    ) -> None:
        """Start the process and import the function there.

        A function with a parameter `sandbox` runs untrusted programs. It receives the mode, and
        `timeout_seconds` if it has that parameter.

        Args:
            source: `module:function`, on Python's path or in the current folder; or
                `path/to/file.py:function`.
            timeout_seconds: time limit for one response.
            sandbox: the source's `sandbox` key.
            key: the config key, for error messages.

        Raises:
            ValueError: the function cannot be imported, or needs a sandbox that cannot be created.
        """
        self._source = source
        self._timeout = timeout_seconds
        self._key = key
        self._settings: dict[str, Any] = {}
        problem = self._start()
        if problem is not None:
            self.close()
            raise ValueError(
                f"{key}={source}: must name a function that can be imported; {problem}. "
                + _remedy(source)
            )
        if "sandbox" in self._accepted:
            if sandbox == "namespaces" and (missing := sandbox_problem()) is not None:
                self.close()
                raise ValueError(
                    f"{key}={source}: needs user namespaces to isolate untrusted programs; "
                    f"{missing}. Allow user namespaces on this machine, or add sandbox: off to the "
                    "source to run these programs with all rights of this user."
                )
            self._settings = {"sandbox": sandbox, "timeout_seconds": timeout_seconds}

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
            rows: data row of each prompt. The function receives the fields that are its
                parameters; values that JSON cannot represent (such as dates) arrive as text.
        """
        requests = [
            {"prompt": prompt, "response": response, "fields": other_fields(row) | self._settings}
            for prompt, response, row in zip(prompts, responses, rows, strict=True)
        ]
        answers: list[dict[str, Any]] = []
        while len(answers) < len(requests):
            answers += self._score_chunk(requests[len(answers) : len(answers) + CHUNK])
        values = torch.tensor([a.get("score", 0.0) for a in answers], dtype=torch.float32)
        finite = values.isfinite()
        scored = torch.tensor(["score" in a for a in answers], dtype=torch.bool)
        errors = [
            a.get("error") or f"returned {a['score']}"
            for a, valid in zip(answers, (finite & scored).tolist(), strict=True)
            if not valid
        ]
        return Scores(torch.where(finite, values, 0.0), finite & scored, errors)

    def close(self) -> None:
        """End the process. It also ends with this object and with this process."""
        self._end()

    def _score_chunk(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the answers up to the first call without one, whose answer is the reason."""
        if self._process.poll() is not None:  # died between two batches: no sample's fault
            self._restart()
        assert self._process.stdin is not None
        # A broken pipe means that it has just died; reading returns the exit code.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(_encode(requests))
            self._process.stdin.flush()
        answers: list[dict[str, Any]] = []
        for _ in requests:
            answer = self._receive(self._timeout)
            if "needs" in answer:
                answer = self._receive(answer["needs"])
            answers.append(answer)
            if answer.get("lost"):
                self._restart()
                break
        return answers

    def _start(self) -> str | None:
        """Start the process; return why that failed, None if it is ready."""
        paths = [str(Path.cwd()), *filter(None, sys.path)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "marlhf_mega.rewards.worker", self._source, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        self._end = weakref.finalize(self, _end, self._process)
        self._received = b""
        answer = self._receive(START_SECONDS)
        self._accepted: list[str] = answer.get("ready") or []
        return answer.get("error")

    def _restart(self) -> None:
        self._end()
        problem = self._start()
        if problem is not None:
            raise RuntimeError(
                f"{self._key}={self._source}: must be importable after a restart; {problem}. "
                "Fix it and resume."
            )

    def _receive(self, seconds: float) -> dict[str, Any]:
        """Return the next answer, or why there will be none, marked as `lost`."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            # Poll even after the deadline: what arrived counts if this process was held up.
            if not poll.poll(max(deadline - time.monotonic(), 0.0) * 1000):
                return {"error": f"took longer than {seconds:g} s", "lost": True}
            data = os.read(pipe, 1 << 16)
            if not data:
                code = self._process.wait()
                return {"error": f"ended its process with exit code {code}", "lost": True}
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return dict(json.loads(line))


def check_importable(
    source: str, *, sandbox: SandboxMode = "namespaces", key: str = "reward.source"
) -> None:
    """Check, before a run starts, that a rule can be imported and has the sandbox that it needs.

    Raises:
        ValueError: see `RuleReward`.
    """
    RuleReward(source, sandbox=sandbox, key=key).close()


def _remedy(source: str) -> str:
    if source.rpartition(":")[0].endswith(".py"):
        return "Fix the file, or its path."
    return "Fix the module, or add its folder to PYTHONPATH."


def _encode(requests: Sequence[Mapping[str, Any]]) -> bytes:
    return json.dumps({"samples": requests}, default=str).encode() + b"\n"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        # The function may have started other processes, so end the whole session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
