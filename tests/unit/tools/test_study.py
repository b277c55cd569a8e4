"""A study: its grid, what its runner starts and leaves, and its numbers by hand."""

import csv
import dataclasses
import importlib
import json
import signal
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from marlhf_mega.config.load import ConfigError, load_config

STUDY = Path(__file__).parents[3] / "tools" / "study"
ALMOST_EQUAL = pytest.mark.filterwarnings("ignore:Precision loss")


@pytest.fixture(scope="module")
def study():
    """Return the program's modules by name; they import each other as scripts do."""
    sys.path.insert(0, str(STUDY))
    yield {
        n: importlib.import_module(n)
        for n in ("grid", "runner", "results", "frontier", "page", "study")
    }
    sys.path.remove(str(STUDY))


GRID = """
runs: {{job: sft, config: study:base.yaml, overrides: [run.steps=2]}}
seeds: [1, 2]
baseline: {baseline}
arms:
  slow: [policy.lr=1e-4]
  {other}: [policy.lr=1e-3]
"""


def grid_file(folder, baseline="slow", other="fast", text=GRID):
    path = folder / "grid.yaml"
    path.write_text(text.format(baseline=baseline, other=other))
    return path


@pytest.mark.parametrize(("main", "tuning"), [("toy", "tuning"), ("toy-gold", "tuning-gold")])
def test_what_is_tuned_is_tuned_on_other_seeds_of_the_same_task(study, main, tuning):
    main, tuning = (study["grid"].load_grid(STUDY / f"{n}.yaml") for n in (main, tuning))
    assert main.prepare["base"] == tuning.prepare["base"]
    assert {*tuning.runs.overrides} <= {*main.runs.overrides}
    assert len(main.seeds) == 5
    assert not {*main.seeds} & {*tuning.seeds}
    assert not {*main.arms} & {*tuning.arms}  # they share a directory


def test_the_keys_of_shipped_grids_are_known(study, tmp_path):
    for path in STUDY.glob("*.yaml"):
        grid = study["grid"].load_grid(path)
        shared = study["runner"].shared_runs(grid, tmp_path)
        for run in chain(shared, *study["runner"].arm_runs(grid, tmp_path)):
            known = [text for text in run.overrides if not text.startswith("model.init=")]
            load_config(None, known)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"baseline": "fats"},
            "baseline=fats: must be an arm; there are slow, fast. Choose one of them.",
        ),
        (
            {"other": "a/b"},
            "'a/b': must be letters, digits, '.', '-' or '_', since directories are named so. "
            "Rename it.",
        ),
        ({"text": GRID + "grids: 3\n"}, "grids: Extra inputs are not permitted"),
        (
            {"text": GRID + "drawn: [fats]\n"},
            "drawn: fats must be an arm; there are slow, fast. Choose among them.",
        ),
        (
            {"text": GRID + "frontiers: {{n: [slow, fats]}}\n"},
            "frontiers.n: fats must be an arm; there are slow, fast. Choose among them.",
        ),
        (
            {"text": GRID.replace("[1, 2]", "[1, 1]")},
            "seeds=[1, 1]: must be different numbers, one at least. Change them.",
        ),
    ],
)
def test_a_wrong_grid_is_refused(study, tmp_path, keys, message):
    path = grid_file(tmp_path, **keys)
    with pytest.raises(ConfigError) as caught:
        study["grid"].load_grid(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_grid_that_is_not_there(study, tmp_path, capsys):
    assert study["study"].main(["run", str(tmp_path / "none.yaml"), str(tmp_path)]) == 2
    assert "cannot be read: No such file or directory. Give a YAML file." in capsys.readouterr().err


def test_an_arm_that_is_not_in_the_grid(study, tmp_path):
    grid = study["grid"].load_grid(grid_file(tmp_path))
    with pytest.raises(ConfigError) as caught:
        study["runner"].arm_runs(grid, tmp_path, arms=["fest"])
    assert str(caught.value) == (
        "--arms fest: must be in the grid, which has slow, fast. Choose among them."
    )


def test_runs_of_a_seed_stand_together_and_know_the_directory(study, tmp_path):
    grid = study["grid"].load_grid(grid_file(tmp_path))
    [runs] = study["runner"].arm_runs(grid, tmp_path, seeds=[2])
    assert [run.name for run in runs] == ["slow seed 2", "fast seed 2"]
    assert runs[1].config == tmp_path / "base.yaml"
    assert runs[1].overrides == (
        "run.steps=2",
        "policy.lr=1e-3",
        "run.seed=2",
        "run.name=fast seed 2",
        f"run.dir={tmp_path}/fast/seed-2",
    )


def test_an_arm_with_jobs_of_its_own_reads_what_the_one_before_has_left(study, tmp_path):
    own = (
        "  own:\n"
        "    - {{job: preference, config: study:base.yaml}}\n"
        "    - {{job: evaluate, overrides: ['model.init=previous:', 'data.x=study:y']}}\n"
    )
    grid = study["grid"].load_grid(grid_file(tmp_path, text=GRID + own))
    first, second = study["runner"].arm_runs(grid, tmp_path, seeds=[2])
    assert [run.name for run in first] == ["slow seed 2", "fast seed 2", "own seed 2"]
    folder = tmp_path / "own"
    assert first[2].job == "preference"
    assert first[2].log == folder / "seed-2.1.log"
    assert f"run.dir={folder}/seed-2.1" in first[2].overrides
    [judged] = second
    assert (judged.job, judged.config) == ("evaluate", None)
    assert judged.overrides == (
        f"model.init={folder}/seed-2.1/",
        f"data.x={tmp_path}/y",
        "run.seed=2",
        "run.name=own seed 2",
        f"run.dir={folder}/seed-2",
    )
    assert grid.has_own_jobs("own")
    assert not grid.has_own_jobs("slow")


def test_what_is_finished_is_left_and_what_fails_is_told(study, tmp_path, capsys):
    """The real command is started, and refuses a run without data."""
    (tmp_path / "base.yaml").write_text("model: {num_layers: 1}\n")
    path = grid_file(tmp_path, text=GRID.replace("[1, 2]", "[1]"))
    grid = study["grid"].load_grid(path)
    [[slow, _]] = study["runner"].arm_runs(grid, tmp_path)
    slow.target.parent.mkdir(parents=True)
    slow.note_done()
    assert study["study"].main(["run", str(path), str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("1 of 2 runs are done\n[1/1] fast seed 1: exit code 2, see ")
    assert "data.train_path" in (tmp_path / "fast" / "seed-1.log").read_text()


def test_what_is_done_is_run_again_only_with_other_settings(study, tmp_path, monkeypatch):
    runner = study["runner"]
    started = tmp_path / "started"
    job = f"open({str(started)!r}, 'a').write('x')"

    def command(run):
        return [sys.executable, "-c", job, run.job, *run.overrides]

    monkeypatch.setattr(runner.Run, "command", command)
    grid = study["grid"].load_grid(grid_file(tmp_path, text=GRID.replace("[1, 2]", "[1]")))
    for expected in ("xx", "xx"):
        assert runner.run_all(runner.arm_runs(grid, tmp_path)[0], parallel=2) == 0
        assert started.read_text() == expected
    other = grid.model_copy(update={"arms": grid.arms | {"fast": ("policy.lr=2e-3",)}})
    assert runner.run_all(runner.arm_runs(other, tmp_path)[0], parallel=2) == 0
    assert started.read_text() == "xxx"


def test_an_arm_that_fails_holds_up_no_other(study, tmp_path, monkeypatch):
    """The second job of an arm runs if its own first one is done, whatever became of the rest."""
    jobs = "- {{job: preference, overrides: [policy.lr={}]}}\n    - {{job: evaluate}}"
    text = "runs: {{job: sft}}\nseeds: [1]\nbaseline: {baseline}\narms:\n  slow: []\n"
    arms = "".join(f"  {n}:\n    {jobs.format(lr)}\n" for n, lr in (("good", 1), ("bad", 2)))
    path = grid_file(tmp_path, text=text + arms.replace("{", "{{").replace("}", "}}"))
    told = tmp_path / "told"
    job = f"import sys; open({str(told)!r}, 'a').write(sys.argv[1] + ' '); "
    job += "sys.exit('policy.lr=2' in sys.argv)"
    monkeypatch.setattr(
        study["runner"].Run,
        "command",
        lambda run: [
            sys.executable,
            "-c",
            job,
            run.name.split()[0] + "-" + run.job,
            *run.overrides,
        ],
    )
    assert study["study"].main(["run", str(path), str(tmp_path)]) == 1
    assert told.read_text().split() == [
        "slow-sft",
        "good-preference",
        "bad-preference",
        "good-evaluate",
    ]


def test_a_signal_reaches_the_jobs_and_the_rest_is_not_started(
    study, tmp_path, capsys, monkeypatch
):
    """A job that saves and ends with 75, as ours do (tests/e2e/test_stop.py)."""
    job = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    runner = study["runner"]
    (tmp_path / "base.yaml").write_text("model: {num_layers: 1}\n")
    [runs] = runner.arm_runs(study["grid"].load_grid(grid_file(tmp_path)), tmp_path)
    monkeypatch.setattr(runner.Run, "command", lambda _: [sys.executable, "-c", job])
    before = signal.getsignal(signal.SIGTERM)
    assert runner.run_all(runs, parallel=1) == 75
    assert signal.getsignal(signal.SIGTERM) == before
    said = capsys.readouterr().out
    assert "[1/4] slow seed 1: exit code 75" in said
    assert "[2/4]" not in said
    assert said.endswith("stopped; the same command goes on\n")


def test_where_a_curve_reaches_a_level(study):
    steps_to = study["results"].steps_to
    steps, gold = np.array([0.0, 10, 20]), np.array([0.0, 0.4, 0.8])
    assert steps_to(0.5, steps, gold) == pytest.approx(12.5)
    assert steps_to(0.0, steps, gold) == 0
    assert np.isinf(steps_to(0.9, steps, gold))


@pytest.fixture
def arms(study):
    """Two arms that differ by almost the same at both seeds, so that resamples hardly matter."""

    def arm(name, gold, kl, score):
        gold = np.array([gold, np.add(gold, 0.1)])
        kl, score = np.array([kl, kl]), np.array([score, score])
        return study["results"].Arm(
            name=name,
            seeds=(1, 2),
            steps=np.array([0.0, 10, 20]),
            curves={"eval/gold_mean": gold, "eval/kl": kl, "eval/score_mean": score},
            seconds=np.array([[0.0, 5, 10]] * 2),
        )

    return {
        "token": arm("token", [0.0, 0.2, 0.4], [0.0, 2, 4], [0.0, 1, 2]),
        "ngram": arm("ngram", [0.0, 0.4, 0.6], [0.0, 1, 4], [0.0, 2, 6]),
    }


@ALMOST_EQUAL
def test_an_arm_against_the_baseline_by_hand(study, arms):
    token, ngram = study["results"].compare(arms, "token")
    assert (token.difference, token.speed_up, token.p_value) == (None, None, None)
    assert token.final.value == pytest.approx(0.45)
    assert (token.final.low, token.final.high) == pytest.approx((0.4, 0.5))
    assert ngram.area.value == pytest.approx((0.2 + 0.5) / 2 + 0.05)
    found = ngram.difference
    assert [found.value, found.low, found.high] == pytest.approx([0.2] * 3)
    assert ngram.speed_up.value == pytest.approx(2)  # token's 0.4 at step 20, here at step 10
    assert ngram.score_speed_up.value == pytest.approx(2)
    # Half of the baseline's KL is 2: at step 10 for it, at step 13.33 here.
    assert ngram.at_equal_kl.value == pytest.approx(0.4 + 0.2 / 3 - 0.2)


@ALMOST_EQUAL
def test_an_arm_that_never_gets_there(study, arms):
    arms = {"ngram": arms["ngram"], "token": arms["token"]}
    token = study["results"].compare(arms, "ngram")[1]
    assert token.speed_up.value == 0


@ALMOST_EQUAL
def test_an_arm_of_another_job_is_compared_at_its_end_alone(study, arms):
    ends = {"eval/gold_mean": arms["ngram"].gold[:, -1:]}
    dpo = study["results"].Arm(
        name="dpo",
        seeds=(1, 2),
        steps=np.array([0.0]),
        curves=ends,
        seconds=np.zeros((2, 1)),
        has_own_jobs=True,
    )
    _, row = study["results"].compare({"token": arms["token"], "dpo": dpo}, "token")
    assert row.difference.value == pytest.approx(0.2)
    assert np.isnan(row.kl)
    assert [row.area, row.speed_up, row.score_speed_up, row.at_equal_kl] == [None] * 4


@ALMOST_EQUAL
def test_frontiers_by_hand(study, arms):
    """Token ends at KL 4 and 8 with 0.45 and 0.65, n-grams at 2 and 6 with 0.65 and 0.85."""
    ends = study["frontier"]

    def at(name, arm, kl, gold):
        curves = {"eval/kl": arm.curves["eval/kl"] + kl, "eval/gold_mean": arm.gold + gold}
        return dataclasses.replace(arm, name=name, curves=curves)

    more = [
        at("token-free", arms["token"], 4, 0.2),
        at("ngram", arms["ngram"], -2, 0),
        at("ngram-free", arms["ngram"], 2, 0.2),
    ]
    both = arms | {arm.name: arm for arm in more}
    families = {"token": ["token-free", "token"], "n": ["ngram", "ngram-free", "not-run"]}
    families["none"] = ["not-run"]
    token, ngram = ends.frontiers(both, families)
    assert token.lead is None
    assert token.kl.tolist() == [4, 8]
    assert token.gold.tolist() == pytest.approx([0.45, 0.65])
    # At KL 4 it is 0.75 against 0.45, at 6 0.85 against 0.55.
    assert ngram.lead.value == pytest.approx(0.3)
    assert (ngram.lead.low, ngram.lead.high) == pytest.approx((0.3, 0.3))
    # Token's arm of KL 4 needs 20 steps for 0.45. The mean of the n-gram curves, 0.05, 0.45, 0.65
    # and 0.2 more, is 0.15 and 0.55 at steps 0 and 10: 0.45 after 7.5. KL 8 is beyond them.
    assert ngram.speed_ups["token"].value == pytest.approx(20 / 7.5)
    assert np.isnan(ngram.speed_ups["token-free"].value)
    assert np.isnan(ends.frontier_lead([both["ngram"]], [both["token"]], np.arange(2)))
    assert ends.frontiers(both, {}) == []


def test_an_interval_is_that_of_all_resamples(study):
    results = study["results"]
    ends = np.array([0.0, 1.0])
    found = results.estimate(lambda rows: ends[rows].mean(), results.resamples(2))
    # (0, 0), (0, 1), (1, 0), (1, 1): a quarter of all at either end.
    assert [found.value, found.low, found.high] == [0.5, 0, 1]


@ALMOST_EQUAL
def test_page_and_table(study, arms, tmp_path):
    text = (
        "runs: {{job: ppo}}\nseeds: [1, 2]\nbaseline: {baseline}\narms: {{token: [], ngram: []}}\n"
    )
    text += "drawn: [ngram]\nfrontiers: {{token: [token], fives: [ngram]}}\n"
    grid = study["grid"].load_grid(grid_file(tmp_path, baseline="token", text=text))
    page = study["page"].write_page(arms, grid, tmp_path)
    text = page.read_text()
    assert "| ngram | 2 | 0.6500 [0.6000, 0.7000] |" in text
    assert "| ngram | 6.00 |  |  | 0.50 |" in text
    never = study["page"]._times(study["results"].Estimate(value=0.0, low=0.0, high=1.5))
    assert never == "never"
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(rows) == 12
    assert rows[4] == {
        "arm": "token",
        "seed": "2",
        "step": "10",
        "seconds": "5",
        "eval/gold_mean": "0.3",
        "eval/kl": "2",
        "eval/score_mean": "1",
    }
    assert "| fives | 4.00 | 0.650 |  |" in text
    assert "| fives | token | 2.00 |" in text
    for figure in ("steps.svg", "seconds.svg", "kl.svg", "frontier.svg"):
        assert (tmp_path / figure).read_text().count("<path") > 3
    assert ">ngram</text>" in (tmp_path / "steps.svg").read_text()
    assert ">token</text>" not in (tmp_path / "steps.svg").read_text()


def test_a_report_reads_what_is_done_with_the_settings_of_the_grid(study, tmp_path):
    grid = study["grid"].load_grid(grid_file(tmp_path))
    [runs] = study["runner"].arm_runs(grid, tmp_path)
    for run in runs[:3]:
        run.target.mkdir(parents=True)
        lines = [{"step": 0, "eval/gold_mean": 0.5}, {"step": 2, "eval/gold_mean": 0.7}]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (run.target / "metrics.jsonl").write_text(text)
        run.note_done()
    found = study["results"].read_arms(grid, tmp_path)
    assert {name: arm.seeds for name, arm in found.items()} == {"slow": (1, 2), "fast": (1,)}
    assert found["slow"].gold.tolist() == [[0.5, 0.7]] * 2
    other = grid.model_copy(update={"arms": grid.arms | {"fast": ("policy.lr=2e-3",)}})
    assert [*study["results"].read_arms(other, tmp_path)] == ["slow"]


def test_small_p_values_are_not_zero(study):
    shown = study["page"]._p_value
    assert [shown(None), shown(0.0004), shown(0.039)] == ["", "< 0.001", "0.039"]


def test_a_report_needs_the_baseline(study, tmp_path, capsys):
    path = grid_file(tmp_path)
    assert study["study"].main(["report", str(path), str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"{tmp_path}: must have a finished run of the baseline slow. Run it first.\n"
    )
