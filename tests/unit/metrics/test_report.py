import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from marlhf_mega.metrics.report import report
from marlhf_mega.metrics.stage import changes, read_stage
from marlhf_mega.metrics.writers import MetricsWriter, Sample, SamplesWriter

HOSTILE = "<script>alert('x')</script> \"quoted\" & <img src=http://x/y>"


class Page(HTMLParser):
    """Collects what a browser would: elements, text, what would be loaded."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def by_class(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.elements if name in (a.get("class") or "").split()]


def make_run(run_dir: Path, steps: list[dict[str, float]], samples: dict[int, list[Sample]]):
    with MetricsWriter(
        run_dir, run_name="x", config={}, first_step=0, tensorboard=False, wandb_project=None
    ) as writer:
        for step, metrics in enumerate(steps):
            writer.write(step, metrics)
    writer = SamplesWriter(run_dir, first_step=0)
    for step, some in samples.items():
        writer.write(step, some)
    writer.close()
    return run_dir


def ppo_run(run_dir: Path) -> Path:
    sample = Sample(
        prompt="Name a fruit.", tokens=["An", " apple", ", of", " course"], action_starts=[0, 3]
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
    assert "10.0 standard errors" in page.text  # 0.5 / sqrt(0.03^2 + 0.04^2)
    assert "step 2: 1.5" in page.text
    assert "step 1: nan" not in page.text
    assert "step 0: other 1 s of 4 s" in page.text
    first, second = page.by_class("action")[:2]
    assert first["title"] == "macro action 1: 3 tokens"
    assert second["title"] == "macro action 2: 1 tokens"
    assert first["class"] != second["class"]


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
    run_dir = make_run(
        tmp_path / "run",
        [
            {f"group/{HOSTILE}": 1.0, f"time/{HOSTILE}_seconds": 1.0, f"eval/{HOSTILE}": float(n)}
            for n in range(2)
        ],
        {0: [Sample(prompt=HOSTILE, tokens=[HOSTILE, "\ud800\x00"], action_starts=[0])]},
    )
    (run_dir / "config.yaml").write_text(
        f"run:\n  name: |\n    {HOSTILE}\nversions:\n  torch: |\n    {HOSTILE}\n"
    )
    report([run_dir], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert page.text.count("alert('x')") >= 8
    assert "\x00" not in page.text


def test_stages_come_in_order_with_links(tmp_path):
    sft = make_run(tmp_path / "sft", [{"sft/loss": 2.0}, {"sft/loss": 1.0}], {})
    report([sft, ppo_run(tmp_path / "ppo")], tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert [a["href"] for tag, a in page.elements if tag == "a"] == ["#stage0", "#stage1"]
    assert [a["id"] for tag, a in page.elements if tag == "section"] == ["stage0", "stage1"]


def test_a_run_that_never_finished_a_step_still_has_a_report(tmp_path):
    report([make_run(tmp_path / "run", [], {})], tmp_path / "report.html")
    assert "run" in Page(tmp_path / "report.html").text


def test_a_long_run_stays_small(tmp_path):
    steps = [{f"policy/m{n}": float(s % 17) for n in range(40)} for s in range(2000)]
    report([make_run(tmp_path / "run", steps, {})], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_before_and_after_with_standard_errors_by_hand(tmp_path):
    (change,) = changes(read_stage(ppo_run(tmp_path / "ppo")))
    assert (change.name, change.before, change.after) == ("eval/gold_mean", 0.25, 0.75)
    assert change.standard_errors == pytest.approx(10.0)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a run directory; it has no metrics\.jsonl\. "):
        report([tmp_path], tmp_path / "report.html")


def test_a_report_can_be_made_again_by_hand(tmp_path):
    run_dir, out = ppo_run(tmp_path / "ppo"), tmp_path / "again.html"
    command = [sys.executable, "-m", "marlhf_mega.metrics.report", run_dir, "--out", out]
    subprocess.run(command, check=True, timeout=120)
    report([run_dir], tmp_path / "first.html")
    assert out.read_bytes() == (tmp_path / "first.html").read_bytes()
