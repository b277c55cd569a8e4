"""Early ends of a run: signals, the time limit, and starts without progress."""

import os
import signal

import pytest

from marlhf_mega.config.exit_codes import EXIT_CODE_FILE, EXIT_NO_PROGRESS, EXIT_PREEMPTED
from marlhf_mega.config.schema import Config
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.resilience.preemption import (
    EarlyEndError,
    StopRequest,
    count_attempt,
    hearing_signals,
)


@pytest.fixture(scope="module")
def mesh():
    yield create_mesh(Config().parallel)
    destroy_mesh()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_requests_a_stop_even_before_somebody_asks(mesh, number):
    before = signal.getsignal(number)
    with hearing_signals():
        assert not StopRequest(Config(), mesh).is_made()
        os.kill(os.getpid(), number)
        request = StopRequest(Config(), mesh)
        assert request.is_made()
        assert request.is_made()
    assert signal.getsignal(number) == before
    with hearing_signals():
        assert not request.is_made()
    end = request.end(4)
    assert end.code == EXIT_PREEMPTED == 75
    assert "saved after step 4" in str(end)


@pytest.mark.parametrize(("hours", "made"), [(None, False), (1000.0, False), (1e-9, True)])
def test_the_time_limit_counts_from_the_start_of_the_launch(mesh, hours, made):
    config = Config.model_validate({"run": {"max_hours": hours}})
    with hearing_signals():
        assert StopRequest(config, mesh).is_made() == made


def starts(config, mesh, *steps):
    for step in steps:
        count_attempt(config, step, mesh)


def test_too_many_starts_from_one_step_end_the_run(mesh, tmp_path, monkeypatch):
    monkeypatch.setenv(EXIT_CODE_FILE, "any")
    config = Config.model_validate({"run": {"dir": tmp_path / "run", "max_attempts": 2}})
    starts(config, mesh, 0, 0, 5, 5)  # step 5 is progress
    with pytest.raises(EarlyEndError, match=r"run\.max_attempts=2: at most this many") as end:
        count_attempt(config, 5, mesh)
    assert end.value.code == EXIT_NO_PROGRESS == 76
    starts(config, mesh, 6)
    (tmp_path / "run" / "attempts.json").unlink()
    starts(config, mesh, 6, 6)


def test_without_a_launcher_nothing_is_counted(mesh, tmp_path, monkeypatch):
    monkeypatch.delenv(EXIT_CODE_FILE, raising=False)
    config = Config.model_validate({"run": {"dir": tmp_path / "run", "max_attempts": 1}})
    starts(config, mesh, 0, 0, 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 0}', '{"step": 0, "attempts": null}'])
def test_a_damaged_count_of_starts_is_named_and_replaced(mesh, tmp_path, monkeypatch, caplog, text):
    monkeypatch.setenv(EXIT_CODE_FILE, "any")
    config = Config.model_validate({"run": {"dir": tmp_path, "max_attempts": 1}})
    path = tmp_path / "attempts.json"
    path.write_text(text)
    starts(config, mesh, 0)
    (record,) = caplog.records
    assert f"{path}: is damaged and replaced" in record.getMessage()
    with pytest.raises(EarlyEndError):
        starts(config, mesh, 0)
