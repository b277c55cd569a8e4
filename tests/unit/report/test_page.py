import json
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path

import pytest

from marlhf_mega.metrics.writers import Action, MetricsWriter, Sample, SamplesWriter
from marlhf_mega.report.compare import MAX_RUNS
from marlhf_mega.report.page import report

HOSTILE = "<script>alert('x')</script> \"quoted\" & <img src=http://x/y>"


class Page(HTMLParser):
    """Collects what a browser would: elements, text, what would be loaded."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[tuple[str, list[str]]] = []
        self.of_class: dict[str, list[str]] = {}
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            classes = (dict(attrs).get("class") or "").split()
            self.open.append((tag, classes))
            for name in classes:
                self.of_class.setdefault(name, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.texts.append(data)
        for name in {name for _, classes in self.open for name in classes}:
            self.of_class[name][-1] += data

    def inside(self, name: str) -> list[str]:
        """The text in each element of a class."""
        return self.of_class.get(name, [])

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def by_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]


def make_run(run_dir: Path, steps: list[dict[str, float]], samples: dict[int, list[Sample]]):
    options = {"tensorboard": False, "wandb_project": None}
    metrics_writer = MetricsWriter(run_dir, run_name="x", config={}, first_step=0, **options)
    with closing(metrics_writer) as writer:
        for step, metrics in enumerate(steps):
            writer.write(step, metrics)
    with closing(SamplesWriter(run_dir, first_step=0)) as writer:
        for step, some in samples.items():
            writer.write(step, some)
    return run_dir


def ppo_run(run_dir: Path) -> Path:
    sample = Sample(
        id=0,
        prompt="Name a fruit.",
        tokens=["Une", " p", "\u00eache", ",\n", "\U0001f351", ""],
        end="</s>",
        actions=[
            Action(start=0, length=3, advantage=1.5, value=0.25, kl=0.5),
            Action(start=3, length=3, advantage=-0.5, value=0.75, kl=-0.125),
        ],
        score=2.5,
        shaped=1.25,
        kl=0.375,
    )
    make_run(
        run_dir,
        [
            {
                "rollout/score_mean": 0.5,
                "time/step_seconds": 4.0,
                "time/rollout_seconds": 1.0,
                "time/update_seconds": 2.0,
                "eval/gold_mean": 0.25,
                "eval/gold_stderr": 0.03,
            },
            {"rollout/score_mean": float("nan"), "time/step_seconds": 4.0},
            {"rollout/score_mean": 1.5, "eval/gold_mean": 0.75, "eval/gold_stderr": 0.04},
        ],
        {0: [sample], 2: [sample]},
    )
    (run_dir / "config.yaml").write_text(
        "run: {name: quick ppo, seed: 7}\n"
        "model: {num_layers: 4, hidden_size: 64}\n"
        "layout: '4 ranks: TP2 x PP2 x DP1 + SP'\n"
        "versions: {torch: 2.13.0}\n"
    )
    return run_dir


def test_a_report_holds_results_curves_timings_and_samples(tmp_path):
    report([ppo_run(tmp_path / "ppo")], tmp_path / "out" / "report.html")
    page = Page(tmp_path / "out" / "report.html")
    assert "quick ppo" in page.text
    assert "TP2 x PP2 x DP1 + SP" in page.text
    assert "gold reward" in page.text
    assert "10.0 \N{GREEK SMALL LETTER SIGMA}" in page.text  # 0.5 / sqrt(0.03^2 + 0.04^2)
    assert "step 2: 1.5" in page.text
    assert "step 1: nan" not in page.text
    assert "step 0: other 1 s of 4 s" in page.text
    assert "8.00 s" in page.text


def test_a_sample_shows_its_macro_actions_with_what_they_carry(tmp_path):
    report([ppo_run(tmp_path / "ppo")], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    first, second = page.by_class("action")[:2]
    assert first["class"].split() == ["action", "gain"]
    assert second["class"].split() == ["action", "loss"]
    assert first["style"] == "--w:100"
    assert first["tabindex"] == second["tabindex"] == "0"  # a keyboard and a finger reach it
    words = " ".join(page.text.split())
    assert "score 2.5 \xb7 shaped 1.25 \xb7 KL 0.375 \xb7 6 tokens, 2 macro actions" in words
    tips = page.inside("tip")
    assert " ".join(tips[0].split()) == (
        "macro action 1 of 2, 3 tokens \xb7 advantage +1.5 \xb7 value +0.25 \xb7 KL +0.5"
    )
    assert "advantage \u22120.5 \xb7 value +0.75 \xb7 KL \u22120.125" in " ".join(tips[1].split())
    # The text is whole, its characters too; the end token is visible.
    (reply, *_) = page.inside("reply")
    for shown in page.inside("tip")[:2] + ["</s>"]:
        reply = reply.replace(shown, "", 1)
    assert reply == "Une p\u00eache,\n\U0001f351"
    assert page.inside("end") == ["</s>", "</s>"]
    strips = [
        a["aria-label"] for _, a in page.elements if "macro action" in a.get("aria-label", "")
    ]
    assert strips[:3] == [f"{row} of each macro action" for row in ("advantage", "value", "KL")]


def test_an_action_that_is_a_part_of_a_character_is_there(tmp_path):
    """The first action has the whole emoji, the second one the rest of its bytes."""
    actions = [Action(start=k, length=2, advantage=1.0, value=0.0, kl=0.0) for k in (0, 2)]
    sample = Sample(id=0, prompt="p", tokens=["a", "\U0001f600", "", ""], actions=actions)
    report([make_run(tmp_path / "run", [], {0: [sample]})], tmp_path / "report.html")
    assert Page(tmp_path / "report.html").inside("end") == ["\u2026"]


def test_the_end_of_a_long_response_is_visible(tmp_path):
    actions = [Action(start=k, length=1, advantage=1.0, value=0.0, kl=0.0) for k in range(400)]
    sample = Sample(id=0, prompt="p", tokens=["t"] * 400, end="</s>", actions=actions)
    report([make_run(tmp_path / "run", [], {0: [sample] * 8})], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert page.inside("end") == ["</s>"] * 4
    assert page.inside("reply")[0].count("t") > 400
    assert (tmp_path / "report.html").stat().st_size < 400_000


def test_a_report_loads_nothing_and_runs_nothing(tmp_path):
    report([ppo_run(tmp_path / "ppo")], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert "url(" not in page.text
    assert "@import" not in page.text
    for _, attributes in page.elements:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith("#")


def test_text_of_every_origin_is_escaped(tmp_path):
    action = Action(start=0, length=2, advantage=1.0, value=1.0, kl=1.0)
    tokens = [HOSTILE, "\ud800\x00"]
    hostile = Sample(id=0, prompt=HOSTILE, tokens=tokens, end=HOSTILE, actions=[action])
    run_dir = make_run(
        tmp_path / "run",
        [
            {f"group/{HOSTILE}": 1.0, f"time/{HOSTILE}_seconds": 1.0, f"eval/{HOSTILE}": float(n)}
            for n in range(2)
        ],
        {0: [hostile]},
    )
    (run_dir / "config.yaml").write_text(
        f"run:\n  name: |\n    {HOSTILE}\nversions:\n  torch: |\n    {HOSTILE}\n"
    )
    report([run_dir], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert page.text.count("alert('x')") >= 9
    assert "\x00" not in page.text


def test_the_last_stage_comes_first_and_links_follow_the_order_of_the_runs(tmp_path):
    sft = make_run(tmp_path / "sft", [{"sft/loss": 2.0}, {"sft/loss": 1.0}], {})
    report([sft, ppo_run(tmp_path / "ppo")], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert [a["href"] for tag, a in page.elements if tag == "a"] == ["#stage0", "#stage1"]
    assert [a["id"] for tag, a in page.elements if tag == "section"] == ["stage1", "stage0"]


def test_what_does_not_change_is_a_number_and_no_chart(tmp_path):
    steps = [{"policy/lr": 1e-5, "policy/kl": float(n), "policy/bias": n * 1e-12} for n in range(3)]
    steps[2]["policy/once"] = 0.25
    report([make_run(tmp_path / "run", steps, {})], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert [a["aria-label"] for tag, a in page.elements if tag == "svg"] == [
        "policy/kl",
        "policy/bias",
    ]
    assert {"learning rate", "1e-5", "once", "0.25"} <= set(page.texts)


def test_results_and_curves_have_units(tmp_path):
    steps = [
        {"eval/kl": 0.0, "eval/accuracy": 0.5, "policy/kl": 1.0},
        {"eval/kl": 8.5, "eval/accuracy": 0.75, "policy/kl": 2.0},
    ]
    report([make_run(tmp_path / "run", steps, {})], tmp_path / "report.html")
    words = " ".join(Page(tmp_path / "report.html").text.split())
    assert "KL from the reference 8.5 nats before 0 +8.5" in words
    assert "accuracy 75 % before 50 +25" in words
    assert "KL from the reference 2 nats" in words


def test_a_win_rate_says_what_it_is_against(tmp_path):
    steps = [{"eval/kl": 0.0}, {"eval/win_rate": 0.75, "eval/win_rate_stderr": 0.05}]
    report([make_run(tmp_path / "run", steps, {})], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    words = " ".join(page.text.split())
    assert "win rate over the start 75.0 \xb1 5.0 % +25 against 50 % 5.0 \u03c3" in words
    assert "whose answer now scores above the one before training" in words
    assert len(page.by_class("good")) == 1


def test_only_a_clear_change_is_green_or_red(tmp_path):
    """By more than two standard errors, of what is better when it is higher."""
    steps = [
        {"eval/gold_mean": 0.0, "eval/score_mean": 0.0, "eval/kl": 0.0, "eval/accuracy": 0.5},
        {"eval/gold_mean": 1.0, "eval/score_mean": 1.0, "eval/kl": 9.0, "eval/accuracy": 0.1},
    ]
    errors = {"gold": 0.1, "score": 0.6, "kl": 0.1, "accuracy": 0.01}
    for step in steps:
        step |= {f"eval/{name}_stderr": error for name, error in errors.items()}
    report([make_run(tmp_path / "run", steps, {})], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert [" ".join(text.split()) for text in page.inside("good")] == ["+1 7.1 \u03c3"]
    assert [" ".join(text.split()) for text in page.inside("bad")] == ["-40 28.3 \u03c3"]


def test_a_single_step_has_its_times_in_numbers_only(tmp_path):
    steps = [{}, {"time/step_seconds": 4.0, "time/rollout_seconds": 1.0}]
    report([make_run(tmp_path / "run", steps, {})], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "1 step" in page.texts
    assert not [tag for tag, _ in page.elements if tag == "svg"]


def test_macro_actions_have_pictures(tmp_path):
    run_dir = ppo_run(tmp_path / "ppo")
    position = {"count": 2, "advantage": 1.0, "value": 0.5, "kl": 0.0, "advantage_stderr": 0.25}
    line = {
        "step": 2,
        "lengths": {"2": 1, "5": 3},
        "positions": [position, position | {"advantage": -1.0}],
    }
    (run_dir / "macro_actions.jsonl").write_text(json.dumps(line) + "\n")
    report([run_dir], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    labels = [a.get("aria-label") for tag, a in page.elements if tag == "svg"]
    assert {"macro/lengths", "macro/advantage_by_position"} <= set(labels)
    assert "macro/value_by_position" not in labels  # constant
    assert "5 tokens: 3 macro actions, 75.0 %" in page.text


def test_runs_of_one_job_are_compared_in_one_chart(tmp_path):
    runs = [ppo_run(tmp_path / "runs" / name) for name in ("token", "ngram")]
    report(runs, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    # Both have the same run.name: their folders tell them apart.
    assert page.texts[page.texts.index("ppo: 2 runs compared") :].count("token") >= 1
    labels = [a.get("aria-label") for tag, a in page.elements if tag == "svg"]
    assert labels[:2] == ["eval/gold_mean", "rollout/score_mean"]
    assert "step 2: token 0.75, ngram 0.75" in page.text
    assert [" ".join(legend.split()) for legend in page.inside("legend")] == ["token ngram"] * 2
    assert "gold reward held-out 0.750 \xb1 0.040 0.750 \xb1 0.040" in " ".join(page.text.split())
    assert [a["id"] for tag, a in page.elements if tag == "section"] == [
        "compare-ppo",
        "stage1",
        "stage0",
    ]


def test_every_one_of_many_runs_looks_different(tmp_path):
    """In the legend as in the chart and in the table; without dashes only six could."""
    runs = [ppo_run(tmp_path / "runs" / str(number)) for number in range(MAX_RUNS)]
    report(runs, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    swatches = [a.get("class") or "" for tag, a in page.elements if tag == "i"]
    swatches = [swatch for swatch in swatches if swatch.startswith("fill")]
    in_table, in_legend = swatches[:MAX_RUNS], swatches[MAX_RUNS : 2 * MAX_RUNS]
    lines = [a["class"].removeprefix("line ") for a in page.by_class("line")][:MAX_RUNS]
    assert in_table == in_legend == [line.replace("ink", "fill") for line in lines]
    assert len(set(lines)) == MAX_RUNS
    assert lines[5:8] == ["ink5", "ink0 dash1", "ink1 dash1"]
    styles = (tmp_path / "report.html").read_text()
    assert all(f".dash{n} {{" in styles for n in (1, 2, 3))
    runs.append(ppo_run(tmp_path / "runs" / "one_more"))
    with pytest.raises(ValueError, match="25 runs of ppo cannot be told apart in one chart; give"):
        report(runs, tmp_path / "report.html")


def test_a_run_that_never_finished_a_step_still_has_a_report(tmp_path):
    report([make_run(tmp_path / "run", [], {})], tmp_path / "report.html")
    assert "run" in Page(tmp_path / "report.html").text


def test_a_long_run_stays_small(tmp_path):
    steps = [{f"policy/m{n}": float(s % 17) for n in range(40)} for s in range(2000)]
    report([make_run(tmp_path / "run", steps, {})], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a run directory; it has no metrics\.jsonl\. "):
        report([tmp_path], tmp_path / "report.html")
