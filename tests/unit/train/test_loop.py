"""The order in which a training job evaluates, saves and ends around its steps, by hand."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from marlhf_mega.config.schema import Config
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.resilience.preemption import EarlyEndError
from marlhf_mega.train import loop


class Run:
    """A run of three steps that notes what the loop asks it to do."""

    def __init__(self, first_step, **settings):
        self.config, self.mesh = Config.model_validate(settings), None
        self.first_step, self.num_steps = first_step, 3
        self.calls = calls = []
        self.saver = SimpleNamespace(
            poll=lambda: None, finish=lambda: calls.append("finish"), best=None
        )
        self.output = SimpleNamespace(
            timers=lambda phase: nullcontext(),
            finish_step=lambda done, metrics: calls.append((done, metrics)),
            finish_run=lambda: calls.append("end"),
        )

    def evaluate(self):
        return {"eval": 1}

    def save(self, done):
        self.calls.append(f"save {done}")

    def load(self, folder):
        self.calls.append(f"load {folder.name}")

    def export(self):
        self.calls.append("export")


def train(run):
    around = loop.Loop(run)
    for step in around.steps():
        around.finish_step(step + 1, {"loss": step})
    around.finish()


@pytest.fixture
def stop_at(monkeypatch):
    """Ask every run to stop at some of the loop's questions, counted from 0."""
    monkeypatch.setattr(loop, "count_attempt", lambda *_: None)
    asked, answers = [], set()

    def is_made():
        asked.append(None)
        return len(asked) - 1 in answers

    def end(done):
        return EarlyEndError(75, str(done))

    made = SimpleNamespace(is_made=is_made, end=end)
    monkeypatch.setattr(loop, "StopRequest", lambda *_: made)
    return answers


def test_a_fresh_run_evaluates_where_it_is_due_saves_and_exports(stop_at):
    run = Run(0, evaluate={"interval": 2}, checkpoint={"interval": 1})
    train(run)
    assert run.calls == [
        (1, {"loss": 0}),
        "save 1",
        (2, {"loss": 1, "eval": 1}),
        "save 2",
        (3, {"loss": 2, "eval": 1}),
        "save 3",
        "finish",
        "export",
        "end",
    ]


def test_a_resumed_run_takes_the_steps_that_are_left(stop_at):
    run = Run(2, checkpoint={"export_hf": False})
    train(run)
    assert run.calls == [(3, {"loss": 2, "eval": 1}), "save 3", "finish", "end"]


def test_a_run_that_is_asked_to_stop_saves_after_its_step(stop_at):
    stop_at.add(0)
    run = Run(0)
    with pytest.raises(EarlyEndError, match="^1$"):
        train(run)
    assert run.calls == [(1, {"loss": 0}), "save 1", "finish"]


def test_a_resume_that_is_asked_to_stop_takes_no_step(stop_at):
    stop_at.add(0)
    run = Run(2)
    with pytest.raises(EarlyEndError, match="^2$"):
        train(run)
    assert run.calls == []


def test_a_request_during_the_last_step_changes_nothing(stop_at):
    stop_at.add(1)
    run = Run(2, checkpoint={"export_hf": False})
    train(run)
    assert run.calls[-2:] == ["finish", "end"]


class JudgedRun(Run):
    """A run of many steps whose evaluations are given."""

    def __init__(self, folder, values, first_step=0, **evaluate):
        settings = {"evaluate": {"interval": 1} | evaluate}
        settings |= {"checkpoint": {"keep_best": "eval/loss"}, "run": {"dir": str(folder)}}
        super().__init__(first_step, **settings)
        self.num_steps, self.values = len(values), values[first_step:]

    def evaluate(self):
        return {"eval/loss": self.values.pop(0)}


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(loop, "broadcast_object", lambda value: value)


def did(run):
    return [call for call in run.calls if isinstance(call, str)]


def test_the_best_checkpoint_is_saved_kept_and_exported(stop_at, alone, tmp_path):
    run = JudgedRun(tmp_path, [3.0, 1.0, 2.0, 1.0])
    train(run)
    assert did(run) == [
        *("save 1", "save 2", "save 4", "finish", "load step_000002", "export", "end")
    ]
    assert run.saver.best == 2
    last = JudgedRun(tmp_path, [3.0, 1.0])
    train(last)
    assert did(last) == ["save 1", "save 2", "finish", "export", "end"]


def test_a_run_ends_after_too_many_worse_evaluations_also_when_it_is_resumed(
    stop_at, alone, tmp_path
):
    values = [2.0, 1.0, 3.0, 1.5, 0.5]
    run = JudgedRun(tmp_path, values, patience=2)
    train(run)
    assert did(run) == ["save 1", "save 2", "save 4", "finish", "load step_000002", "export", "end"]
    rows = [{"step": i, "eval/loss": value} for i, value in enumerate([9.0, *values])]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    resumed = JudgedRun(tmp_path, values, first_step=3, patience=2)
    train(resumed)
    assert did(resumed) == ["save 4", "finish", "load step_000002", "export", "end"]
    ended = JudgedRun(tmp_path, values, first_step=4, patience=2)
    train(ended)
    assert did(ended) == ["load step_000002", "export", "end"]
