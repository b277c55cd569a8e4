import importlib.machinery
import importlib.util
import json
import logging
import math
import sys
import types
from contextlib import closing
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from marlhf_mega.metrics.jsonl import read_lines
from marlhf_mega.metrics.writers import HPARAM_METRICS, Action, MetricsWriter, Sample, SamplesWriter


def open_writer(run_dir: Path, first_step: int = 0, **changed) -> MetricsWriter:
    options = {"tensorboard": False, "wandb_project": None} | changed
    options = {"config": {}} | options
    return MetricsWriter(run_dir, run_name="run", first_step=first_step, **options)


def lines(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_one_line_per_step_is_there_before_the_file_is_closed(tmp_path):
    writer = open_writer(tmp_path / "new" / "run")
    writer.write(0, {"policy/loss": 0.5})
    writer.write(1, {"policy/loss": 0.25, "policy/lr": 1e-5})
    assert lines(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {"step": 0, "policy/loss": 0.5},
        {"step": 1, "policy/loss": 0.25, "policy/lr": 1e-5},
    ]
    writer.close()


def test_values_that_json_cannot_hold_become_null_and_are_warned_about_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING), closing(open_writer(tmp_path)) as writer:
        for step in range(2):
            writer.write(step, {"policy/loss": math.nan, "policy/kl": -math.inf, "policy/lr": 1.0})
    expected = {"policy/loss": None, "policy/kl": None, "policy/lr": 1.0}
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 0, **expected}, {"step": 1, **expected}]
    assert [record.message for record in caplog.records] == [
        "step 0: policy/kl is -inf; written as null",
        "step 0: policy/loss is nan; written as null",
    ]


def test_a_resume_drops_what_comes_again_and_a_line_cut_off_by_a_kill(tmp_path):
    with closing(open_writer(tmp_path)) as writer:
        for step in range(5):
            writer.write(step, {"policy/loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "poli')
    with closing(open_writer(tmp_path, first_step=3)) as writer:
        writer.write(3, {"policy/loss": 33.0})
    assert [(line["step"], line["policy/loss"]) for line in lines(path)] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 33.0),
    ]


def test_a_fresh_run_in_a_used_directory_starts_an_empty_file(tmp_path):
    for value in (1.0, 2.0):
        with closing(open_writer(tmp_path)) as writer:
            writer.write(0, {"policy/loss": value})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 0, "policy/loss": 2.0}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 1', r"metrics.jsonl:2: must be JSON; .*\. Remove the line\."),
        ("[1]", r"metrics.jsonl:2: must be an object with an integer step; it is not\. Remove"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(read_lines(path))


def test_tensorboard_holds_the_last_attempt_of_each_step(tmp_path):
    with closing(open_writer(tmp_path, tensorboard=True)) as writer:
        for step in range(4):
            writer.write(step, {"policy/loss": float(step)})
    with closing(open_writer(tmp_path, first_step=2, tensorboard=True)) as writer:
        writer.write(2, {"policy/loss": 22.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("policy/loss")] == [
        (0, 0.0),
        (1, 1.0),
        (2, 22.0),
    ]


CONFIG = {
    "policy": {"lr": 1e-5},
    "macro": {"rule": "fixed_ngram", "n": 5, "lengths": [2, 3]},
    "parallel": {"overlap": False},
    "reward": {"clip": None},
}


def test_tensorboard_has_the_configuration_as_hyper_parameters_of_the_same_run(tmp_path):
    with closing(open_writer(tmp_path, tensorboard=True, config=CONFIG)) as writer:
        writer.write(1, {"eval/gold_mean": 0.5})
    # A resume does not write them again.
    open_writer(tmp_path, first_step=2, tensorboard=True, config=CONFIG).close()
    folder = tmp_path / "tensorboard"
    assert not [path for path in folder.iterdir() if path.is_dir()]
    events = EventAccumulator(str(folder)).Reload()
    assert events.Scalars("eval/gold_mean")[0].value == 0.5
    experiment, session = (
        HParamsPluginData.FromString(
            events.SummaryMetadata(f"_hparams_/{part}").plugin_data.content
        )
        for part in ("experiment", "session_start_info")
    )
    found = session.session_start_info.hparams
    assert found["policy.lr"].number_value == 1e-5
    assert found["macro.rule"].string_value == "fixed_ngram"
    assert found["macro.lengths"].string_value == "[2, 3]"
    assert found["parallel.overlap"].string_value == "false"
    assert found["reward.clip"].string_value == "null"
    metrics = [info.name.tag for info in experiment.experiment.metric_infos]
    assert metrics == list(HPARAM_METRICS)


def test_tensorboard_has_the_texts_of_samples(tmp_path):
    actions = [Action(start=start, length=2, advantage=1.0, value=0.0, kl=0.0) for start in (0, 2)]
    sample = Sample(
        id=3,
        prompt="# Name\na fruit.",
        tokens=["An", " *apple*", "<b>", ""],
        end="</s>",
        actions=actions,
        score=1.5,
        kl=0.25,
    )
    with closing(open_writer(tmp_path, tensorboard=True)) as writer:
        writer.write_texts(10, [sample])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = events.Tensors("sample/0/text_summary")
    assert event.step == 10
    # Indented lines are code: none of the text is markup.
    assert event.tensor_proto.string_val[0].decode() == (
        "sample 3: score 1.5, KL 0.25\n\n    # Name\n    a fruit.\n\nresponse:\n\n"
        "    An *apple*|<b></s>"
    )


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_asking_for_wandb_without_the_package_names_the_key(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"logging\.wandb=proj: needs the wandb package; it is not installed\. Run `pip",
    ):
        open_writer(tmp_path, wandb_project="proj")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first_step in (0, 1):
        with closing(open_writer(tmp_path, first_step, wandb_project="proj")) as writer:
            writer.write(first_step, {"policy/loss": 1.0})
    run_id = (tmp_path / "wandb" / "run_id").read_text()
    offline = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert offline
    assert all(name.endswith(run_id) for name in offline)


def test_a_fresh_start_in_a_used_directory_is_another_wandb_run(tmp_path, monkeypatch):
    """A server would ignore its first steps, which the earlier run has."""
    started = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.init = lambda **options: started.append(options["id"])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for first_step in (0, 3, 0):
        open_writer(tmp_path, first_step, wandb_project="proj").close()
    assert started[0] == started[1] != started[2]


def test_samples_hold_text_scores_and_macro_actions(tmp_path):
    sample = Sample(
        id=3,
        prompt="Name a fruit.",
        tokens=["An", " apple", ", of", " course", ""],
        end="</s>",
        actions=[Action(start=0, length=5, advantage=1.25, value=-0.5, kl=0.125)],
        score=1.5,
        shaped=0.5,
        gold=math.nan,
        kl=0.125,
    )
    writer = SamplesWriter(tmp_path, first_step=0)
    writer.write(10, [sample])
    writer.close()
    assert lines(tmp_path / "samples.jsonl") == [
        {
            "step": 10,
            "id": 3,
            "prompt": "Name a fruit.",
            "response": "An apple, of course",
            "tokens": ["An", " apple", ", of", " course", ""],
            "end": "</s>",
            "actions": [{"start": 0, "length": 5, "advantage": 1.25, "value": -0.5, "kl": 0.125}],
            "score": 1.5,
            "shaped": 0.5,
            "gold": None,
            "kl": 0.125,
        }
    ]


def test_a_resume_drops_samples_that_come_again(tmp_path):
    for first_step in (0, 10):
        writer = SamplesWriter(tmp_path, first_step=first_step)
        for step in (0, 10):
            if step >= first_step:
                writer.write(step, [Sample(id=0, prompt="p", tokens=["r"])])
        writer.close()
    assert [line["step"] for line in lines(tmp_path / "samples.jsonl")] == [0, 10]
