"""A job is complete with exactly its settings and all its results; otherwise it runs."""

import json
import shutil

import pytest

from marlhf_mega.cli import main
from marlhf_mega.config.load import load_config
from marlhf_mega.metrics.progress import results_line
from marlhf_mega.train.complete import find_complete, forget_complete, record_complete


@pytest.fixture
def finished(tmp_path):
    """Return the configuration of a run that has left a model, a page and two checkpoints."""
    config = load_config(None, [f"run.dir={tmp_path}", "run.steps=4", "policy.lr=1e-4"])
    (tmp_path / "hf").mkdir()
    (tmp_path / "report.html").touch()
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step_00000{step}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step_000004\n")
    record_complete(config, [{"eval/kl": 0.0}, {"eval/kl": 1.5}], [tmp_path])
    return config


def test_what_a_finished_run_has_left_is_found(finished, tmp_path):
    found = find_complete(finished)
    assert found.held_out == {"eval/kl": 1.5}
    assert found.describe().splitlines() == [
        f"already complete: {tmp_path} has the results of exactly these settings, nothing was run. "
        "Raise run.steps to go on, or use another run.dir to start anew.",
        f"  {tmp_path / 'hf'}",
        f"  {tmp_path / 'report.html'}",
        f"  {tmp_path / 'checkpoints' / 'step_000004'}",
    ]


@pytest.mark.parametrize(
    "change", ["run.steps=8", "policy.lr=1e-5", "checkpoint.resume=never", "run.dir=elsewhere"]
)
def test_another_setting_is_another_run(finished, tmp_path, change):
    options = [f"run.dir={tmp_path}", "run.steps=4", "policy.lr=1e-4"]
    assert find_complete(load_config(None, options)) is not None
    assert find_complete(load_config(None, [*options, change])) is None


def test_a_result_that_is_gone_is_made_again(finished, tmp_path):
    shutil.rmtree(tmp_path / "checkpoints" / "step_000002")
    assert find_complete(finished) is not None
    shutil.rmtree(tmp_path / "hf")
    assert find_complete(finished) is None


def test_a_run_that_starts_is_not_complete_any_more(finished, tmp_path):
    forget_complete(finished)
    assert find_complete(finished) is None
    forget_complete(finished)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": {}}'])
def test_a_damaged_note_counts_for_nothing(finished, tmp_path, text):
    (tmp_path / "complete.json").write_text(text)
    assert find_complete(finished) is None


def test_a_finished_job_ends_at_once_with_its_results(job_files, tmp_path, capsys, caplog):
    """The second start would need the data, which is gone."""
    data = tmp_path / "sft.jsonl"
    shutil.copy(job_files / "sft.jsonl", data)
    job = [
        *("sft", f"run.dir={tmp_path / 'run'}", f"data.train_path={data}"),
        *(f"data.validation_path={data}", f"tokenizer.path={job_files / 'tok'}"),
        *("model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=64"),
        *("run.steps=1", "sft.batch_size=4", "logging.tensorboard=false"),
    ]
    assert main(job) == 0
    written = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    last = {name: value for name, value in written.items() if name.startswith("eval/")}
    data.unlink()
    for more in ([], ["--check"]):
        capsys.readouterr()
        caplog.clear()
        with caplog.at_level("INFO"):
            assert main([*job, *more]) == 0
        first, *files = capsys.readouterr().out.splitlines()
        assert first.startswith(f"already complete: {tmp_path / 'run'} has the results of exactly")
        assert f"  {tmp_path / 'run' / 'hf'}" in files
        assert f"held-out, at the end: {results_line(last)}" in caplog.messages
    assert main([*job, "run.steps=2"]) == 2
    assert "no such file" in capsys.readouterr().err
