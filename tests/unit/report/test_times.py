import json
import time
from types import SimpleNamespace

import pytest

from marlhf_mega.config.schema import Config
from marlhf_mega.data import toy
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.report.run import read_stage
from marlhf_mega.report.times import is_in_step_times, step_times
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.train.output import RunOutput

LINES = [
    {"step": 0, "time/evaluate_seconds": 9.0},
    {
        "step": 1,
        "time/step_seconds": 10.0,
        "time/rollout_seconds": 4.0,
        "time/experience_seconds": 1.5,
        "time/update_seconds": 4.0,
        # Parts of phases, comparisons of ranks and what happens between steps: not of the sum.
        "time/offload_seconds": 2.0,
        "time/generation_seconds": 30.0,
        "time/rollout_max_seconds": 3.5,
        "time/rollout_min_seconds": 0.5,
        "time/update_slowest_rank": 63.0,
        "time/checkpoint_seconds": 5.0,
    },
    {
        "step": 2,
        "time/step_seconds": 8.0,
        "time/rollout_seconds": 3.0,
        "time/experience_seconds": 1.0,
        "time/update_seconds": 3.5,
        "time/checkpoint_seconds": 7.0,
        "time/evaluate_seconds": 11.0,
    },
]


def times_of(run_dir, lines):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return step_times(read_stage(run_dir).curves)


def test_the_phases_and_the_rest_are_the_step_by_hand(tmp_path):
    times = times_of(tmp_path, LINES)
    assert list(times.steps) == [1, 2]
    assert times.phases == {
        "rollout": [4.0, 3.0],
        "experience": [1.5, 1.0],
        "update": [4.0, 3.5],
        "other": [0.5, 0.5],
    }
    assert times.between == {"evaluate": 20.0, "checkpoint": 12.0}
    assert times.total == sum(times.seconds.values()) == 18.0


def test_a_supervised_step_has_no_rollout(tmp_path):
    lines = [{"step": 1, "time/step_seconds": 0.5, "time/update_seconds": 0.375}]
    assert times_of(tmp_path, lines).phases == {"update": [0.375], "other": [0.125]}


def test_without_a_finished_step_there_is_nothing_to_split(tmp_path):
    assert times_of(tmp_path, LINES[:1]) is None


def test_what_lies_inside_of_phases_is_no_part_of_the_sum():
    assert is_in_step_times("time/step_seconds")
    assert is_in_step_times("time/update_slowest_rank")
    assert not is_in_step_times("time/offload_seconds")


@pytest.fixture
def inputs(tmp_path):
    train_tokenizer(toy.tokenizer_text(0, 300), tmp_path / "tokenizer", vocab_size=400)
    return SimpleNamespace(
        config=Config.model_validate({"run": {"dir": tmp_path / "run"}}),
        tokenizer=Tokenizer.load(tmp_path / "tokenizer"),
        tokenizer_path=tmp_path / "tokenizer",
    )


def test_the_phases_that_a_run_times_add_up_to_its_steps(inputs):
    mesh = create_mesh(inputs.config.parallel)
    try:
        watchdog = Watchdog(inputs.config, mesh)
        with (
            watchdog,
            RunOutput("ppo", inputs, mesh, watchdog, num_steps=3, first_step=0) as output,
        ):
            for done in (1, 2, 3):
                with output.step(done):
                    for phase in ("rollout", "experience", "update"):
                        with output.timers(phase):
                            time.sleep(0.002 * done)
                    time.sleep(0.001)
                with output.timers("evaluate"):
                    time.sleep(0.005)
                output.finish_step(done, {"policy/kl": 0.1})
                with output.timers("checkpoint"):
                    time.sleep(0.005)
    finally:
        destroy_mesh()
    run_dir = inputs.config.run.dir
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = [line["time/step_seconds"] for line in lines]
    times = step_times(read_stage(run_dir).curves)
    assert list(times.phases) == ["rollout", "experience", "update", "other"]
    sums = [sum(parts) for parts in zip(*times.phases.values(), strict=True)]
    assert sums == pytest.approx(measured, rel=1e-12)
    assert times.total == pytest.approx(sum(measured), rel=1e-12)
    assert all(seconds >= 0.001 for seconds in times.phases["other"])
    assert set(times.between) == {"evaluate", "checkpoint"}
