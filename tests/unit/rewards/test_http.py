"""A real server on this machine that works or fails in many ways."""

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from marlhf_mega.config.load import ConfigError, load_config
from marlhf_mega.rewards import http
from marlhf_mega.rewards.combine import check_enough_valid
from marlhf_mega.rewards.http import HttpReward

ODD = [float("nan"), None, "1", True, float("inf"), 1e39, 10**400]

ANSWERS = {
    "/score": lambda lengths, _: (200, {"scores": lengths}),
    "/fails": lambda *_: (500, {}),
    "/recovers": lambda lengths, count: (503 if count < 3 else 200, {"scores": lengths}),
    "/refuses": lambda *_: (401, {}),
    "/moved": lambda *_: (307, {}),
    "/short": lambda lengths, _: (200, {"scores": lengths[:-1]}),
    "/list": lambda lengths, _: (200, lengths),
    "/odd": lambda lengths, _: (200, {"scores": [*ODD, *lengths[len(ODD) :]]}),
}
TEXTS = {"/text": b"no json", "/deep": b"[" * 100_000, "/digits": b"7" * 5000}


class Handler(BaseHTTPRequestHandler):
    """Its path selects its behaviour."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = self.path.split("?")[0]
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body, time.monotonic()))
            count = Counter(seen for seen, *_ in self.server.seen)[self.path]
        if path in ANSWERS:
            lengths = [float(len(response)) for response in body["responses"]]
            status, value = ANSWERS[path](lengths, count)
            self.begin(status)
            self.wfile.write(json.dumps(value).encode())
        elif path in TEXTS:
            self.begin(200)
            self.wfile.write(TEXTS[path])
        elif path == "/drips":
            self.drip()
        elif path == "/hangs":
            time.sleep(3)
        else:
            assert path == "/hangs_up"

    def begin(self, status):
        self.send_response(status)
        self.send_header("Location", "/score")
        self.end_headers()

    def drip(self):
        self.begin(200)
        with contextlib.suppress(OSError):
            for _ in range(60):
                self.wfile.write(b" ")
                time.sleep(0.05)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.05)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    running.seen, running.lock = [], threading.Lock()
    running.address = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, args=(0.05,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def score(server, path, responses, **options):
    rows = [{"prompt": "p", "reference": index} for index in range(len(responses))]
    reward = HttpReward(server.address + path, **options)
    return reward.score(["p"] * len(responses), responses, rows)


def test_scores_come_back_in_order_over_many_requests(server):
    responses = ["x" * (index % 50) for index in range(300)]
    result = score(server, "/score?model=a", responses)
    assert result.scores.tolist() == [float(index % 50) for index in range(300)]
    assert result.valid.all()
    assert result.errors == []
    assert sorted(len(body["responses"]) for _, _, body, _ in server.seen) == [44, 64, 64, 64, 64]
    assert {path for path, *_ in server.seen} == {"/score?model=a"}
    first = next(body for _, _, body, _ in server.seen if body["rows"][0] == {"reference": 0})
    assert first["prompts"] == ["p"] * 64


def test_an_empty_batch_sends_nothing(server):
    result = score(server, "/score", [])
    assert result.scores.shape == result.valid.shape == (0,)
    assert server.seen == []


def test_the_token_comes_from_the_environment(server, monkeypatch):
    score(server, "/score", ["a"])
    monkeypatch.setenv("MARLHF_REWARD_TOKEN", "s3cret")
    score(server, "/score", ["a"])
    assert [headers.get("Authorization") for _, headers, *_ in server.seen] == [
        None,
        "Bearer s3cret",
    ]


@pytest.mark.parametrize(
    ("path", "tries", "reason"),
    [
        ("/fails", 3, "the server answered with status 500"),
        ("/refuses", 1, "the server answered with status 401"),
        ("/moved", 1, "the server answered with status 307"),
        ("/short", 1, "the server sent 2 scores for 3 responses"),
        ("/list", 1, 'the server\'s answer has no list "scores"'),
        ("/text", 1, "the server's answer is not JSON"),
        ("/deep", 1, "the server's answer is not JSON"),
        ("/digits", 1, "the server's answer is not JSON"),
        ("/hangs_up", 3, "the server did not answer: RemoteDisconnected: "),
        ("/hangs", 3, "the server did not answer: "),
        ("/drips", 3, "the server did not answer: TimeoutError: took longer than 0.3 s"),
    ],
)
def test_a_failure_masks_the_samples_after_bounded_attempts(server, path, tries, reason):
    start = time.monotonic()
    result = score(server, path, ["a", "bb", "ccc"], timeout_seconds=0.3)
    assert time.monotonic() - start < 3
    assert result.scores.tolist() == [0.0] * 3
    assert not result.valid.any()
    assert len(result.errors) == 3
    assert all(error.startswith(reason) for error in result.errors), result.errors
    assert [seen for seen, *_ in server.seen] == [path] * tries


def test_a_server_that_recovers_costs_no_sample(server):
    result = score(server, "/recovers", ["a", "bb"])
    assert result.scores.tolist() == [1.0, 2.0]
    assert result.valid.all()
    first, second, third = (when for *_, when in server.seen)
    assert third - second > second - first >= 0.05


def test_a_server_that_is_not_there(server, monkeypatch):
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.01)
    result = HttpReward("http://127.0.0.1:1/").score(["p"], ["r"], [{}])
    assert result.errors[0].startswith("the server did not answer: ConnectionRefusedError")


def test_a_score_that_is_no_number_masks_its_sample_only(server):
    result = score(server, "/odd", ["a"] * 9)
    assert result.valid.tolist() == [False] * 7 + [True, True]
    assert result.scores.tolist() == [0.0] * 7 + [1.0, 1.0]
    assert result.errors == [
        "the server's score is nan",
        "the server's score is NoneType, not a number",
        "the server's score is str, not a number",
        "the server's score is bool, not a number",
        "the server's score is inf",
        "the server's score is 1e+39",
        "the server's score is too large",
    ]


def test_too_many_failures_stop_the_run(server):
    result = score(server, "/fails", ["a"] * 4)
    with pytest.raises(RuntimeError, match="4 of 4 have no score, most often: the server answered"):
        check_enough_valid(result, max_invalid_fraction=0.5, sum_over_data=lambda vector: vector)


@pytest.mark.parametrize("address", ["http://", "http://host:port/", "https:///score"])
def test_an_address_without_a_host_is_refused(address):
    with pytest.raises(
        ConfigError, match="must be a web address; its host is missing or its port is wrong"
    ):
        load_config(None, [f"reward.source={address}"])


def test_a_password_in_the_address_is_refused_and_not_shown():
    with pytest.raises(ConfigError, match="must not contain a password") as caught:
        load_config(None, ["reward.source=http://me:s3cret@host/score"])
    assert "s3cret" not in str(caught.value)


def test_an_address_is_neither_a_model_nor_a_rule():
    (term,) = load_config(None, ["reward.source=https://host/score"]).reward.source
    assert (term.is_server, term.is_model, term.is_rule) == (True, False, False)


def test_sandbox_off_needs_no_quotes():
    (term,) = load_config(None, ["reward.source={source: a:b, sandbox: off}"]).reward.source
    assert term.sandbox == "off"
    assert load_config(None, ["precision.fp8=off"]).precision.fp8 == "off"
