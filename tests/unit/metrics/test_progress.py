"""What people see, as text: at 80 and 120 columns of a terminal, and in a log."""

import io
import logging
import re
import sys

import pytest
from rich.console import Console

from marlhf_mega.metrics.progress import (
    TERMINAL_METRICS,
    Progress,
    TimeLeft,
    results_line,
    show_before_after,
)
from tests.terminal import screen

STEP = {
    "rollout/score_mean": 1.23456,
    "policy/kl": -0.00012,
    "rollout/response_tokens": 31.25,
    "macro/actions_per_response": 6.5,
    "macro/tokens_per_action": 4.8077,
    "policy/clip_fraction": 0.0275,
    "critic/explained_variance": -0.0312,
    "time/step_seconds": 12345.6,
    "policy/entropy": 2.345,
    "rollout/truncated_fraction": 0.125,
    "policy/grad_norm": 0.7071,
    "policy/lr": 3e-6,
    "perf/tokens_per_second": 1234567.0,
    "policy/loss": 9.0,
}
RESULTS = {
    "eval/gold_mean": 0.6179,
    "eval/gold_stderr": 0.0057,
    "eval/gold_change": 0.0758,
    "eval/gold_change_stderr": 0.0061,
    "eval/win_rate": 0.7324,
    "eval/win_rate_stderr": 0.021,
    "eval/kl": 8.65,
    "eval/kl_stderr": 0.21,
    "eval/kl_change": 8.65,
    "eval/kl_change_stderr": 0.21,
}


class Clock:
    """Seconds that pass only when told to."""

    now = 0.0

    def __call__(self):
        return self.now


def terminal(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ={})


def shown(console):
    """Return the lines on a terminal of a console's width."""
    return screen(console.file.getvalue(), console.width)


def run(console, clock=None, interval=1, job="ppo"):
    clock = clock or Clock()
    return Progress(job, num_steps=120, interval=interval, console=console, clock=clock), clock


def three_steps(console):
    """Show a run that logs, ends two steps and is evaluated before and after them."""
    progress, clock = run(console)
    before = {name: value for name, value in RESULTS.items() if "change" not in name}
    with progress:
        progress.show_results(0, {n: v for n, v in before.items() if "win" not in n})
        for done, more in ((1, {}), (2, RESULTS)):
            clock.now += 60
            progress.enter("update")
            progress.update(done, {**STEP, **more})
        print("a line of the log", file=sys.stderr)
        progress.enter("rollout")
    return shown(console)


def test_at_80_columns_everything_that_matters_is_visible(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    lines = three_steps(terminal(80))
    assert lines == [
        "",
        "  held-out, before training         mean ± s.e.",
        "  gold reward                   0.6179 ± 0.0057",
        "  KL from the reference (nats)      8.65 ± 0.21",
        "",
        "     step   score      KL  length actions tok/act  clip % explain  s/step",
        "    1/120    1.23 -1.2e-4    31.2     6.5    4.81    2.75 -0.0312  12,346",
        "    2/120    1.23 -1.2e-4    31.2     6.5    4.81    2.75 -0.0312  12,346",
        "",
        "  held-out, after step 2            mean ± s.e.   since the start",
        "  gold reward                   0.6179 ± 0.0057  +0.0758 ± 0.0061",
        "  win rate over the start (%)        73.2 ± 2.1",
        "  KL from the reference (nats)      8.65 ± 0.21      +8.65 ± 0.21",
        "a line of the log",
        f"ppo   2/120 ╸{'━' * 43}    rollout 1:58:00 left",
        "",
    ]


def test_at_120_columns_there_is_room_for_more():
    lines = three_steps(terminal(120))
    assert (
        "     step   score      KL  length actions tok/act  clip % explain  s/step entropy   cut %"
        "    grad      lr   tok/s"
    ) in lines
    assert (
        "    2/120    1.23 -1.2e-4    31.2     6.5    4.81    2.75 -0.0312  12,346    2.35    12.5"
        "   0.707    3e-6   1.2e6"
    ) in lines


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("job", TERMINAL_METRICS)
def test_no_line_is_wider_than_the_terminal_and_the_bar_keeps_its_ends(width, job):
    console = terminal(width)
    clock = Clock()
    progress = Progress(job, num_steps=10000, console=console, clock=clock)
    metrics = dict.fromkeys(TERMINAL_METRICS[job].values(), -123456.7)
    with progress:
        clock.now = 3600.0
        progress.enter("checkpoint")
        progress.update(1, metrics)
    lines = shown(console)
    assert max(map(len, lines)) <= width
    assert lines[-2].startswith(f"{job}     1/10000 ")
    assert lines[-2].endswith("9999:00:00 left")


def test_columns_do_not_touch():
    console = terminal(80)
    progress, _ = run(console)
    with progress:
        progress.update(1, dict.fromkeys(STEP, -0.000123456))
    line = next(line for line in shown(console) if "1/120" in line)
    assert line.split() == ["1/120", *["-1.2e-4"] * 5, "-0.0123", "-1.2e-4", "-1.2e-4"]


def test_every_step_is_seen_on_the_bar_however_fast_they_are():
    console = terminal(80)
    with Progress("sft", num_steps=50, interval=100, console=console) as progress:
        for done in range(1, 51):
            progress.update(done, STEP)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    seen = {int(step) for step in re.findall(r"(\d+)/50 ", text)}
    assert seen >= set(range(51))


def test_a_long_run_shows_every_tenth_step_the_first_and_the_last():
    console = terminal(80)
    progress, _ = run(console, interval=10, job="sft")
    with progress:
        for done in range(1, 26):
            progress.update(done, {"sft/loss": 1.0})
        progress.update(120, {"sft/loss": 1.0})
    places = [line.split()[0] for line in shown(console) if " 1 " in line]
    assert places == ["1/120", "10/120", "20/120", "120/120"]


def test_without_a_terminal_a_step_is_a_line_of_the_log_with_the_time_left(caplog):
    console = Console(file=io.StringIO(), width=80)
    with caplog.at_level(logging.INFO):
        three_steps(console)
    step = (
        "score 1.23  KL -1.2e-4  length 31.2  actions 6.5  tok/act 4.81  clip % 2.75  "
        "explain -0.0312  s/step 12,346"
    )
    assert [record.message for record in caplog.records] == [
        "held-out, before training: gold reward 0.6179 ± 0.0057  "
        "KL from the reference 8.65 ± 0.21 nats",
        f"ppo step 1/120  left 1:59:00  {step}",
        f"ppo step 2/120  left 1:58:00  {step}",
        "held-out, after step 2: gold reward 0.6179 ± 0.0057 (+0.0758 ± 0.0061)  "
        "win rate over the start 73.2 ± 2.1 %  "
        "KL from the reference 8.65 ± 0.21 nats (+8.65 ± 0.21)",
    ]
    assert console.file.getvalue() == ""


def test_the_time_left_follows_the_latest_steps_without_the_first():
    clock = Clock()
    left = TimeLeft(12, first_step=2, clock=clock)
    assert left.seconds() is None
    clock.now = 100.0
    left.finish(3)
    assert left.seconds() == 900  # 9 more like the only one
    clock.now = 110.0
    left.finish(4)
    assert left.seconds() == 80  # 8 steps of 10 s: the first one took long to warm up
    clock.now = 115.0
    assert left.seconds() == 75
    clock.now = 1000.0
    assert left.seconds() == 0


def test_a_table_of_results_has_units_errors_and_changes():
    console = Console(file=io.StringIO(), width=80)
    before = {"eval/gold_mean": 0.54217, "eval/gold_stderr": 0.0088}
    after = RESULTS | {"eval/response_tokens": 3.0}
    names = ["eval/gold_mean", "eval/kl", "eval/response_tokens"]
    show_before_after(before, after, names, console=console)
    lines = console.file.getvalue().splitlines()
    rows = [line.split("  ") for line in lines[2:]]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["gold reward", "0.5422 ± 0.0088", "0.6179 ± 0.0057", "+0.0758 ± 0.0061"],
        ["KL from the reference (nats)", "-", "8.65 ± 0.21", "+8.65 ± 0.21"],
        ["response length (tokens)", "-", "3", "-"],
    ]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("name", "change", "colour"),
    [
        ("gold_mean", 0.21, "32"),
        ("gold_mean", 0.19, None),
        ("gold_mean", -0.21, "31"),
        ("loss", -0.21, "32"),
        ("kl", 5.0, None),
    ],
)
def test_a_change_is_coloured_beyond_two_standard_errors_if_it_is_good_or_bad(name, change, colour):
    stem = name.removesuffix("_mean")
    after = {f"eval/{name}": 1.0, f"eval/{stem}_change": change}
    after |= {f"eval/{stem}_change_stderr": 0.1}
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system="standard")
    show_before_after({}, after, [f"eval/{name}"], console=console)
    row = console.file.getvalue().splitlines()[2]
    assert re.findall(r"\x1b\[(3[12])m", row) == ([colour] if colour else [])


def test_results_on_one_line_have_units_and_standard_errors():
    metrics = {"eval/kl": 8.65, "eval/kl_stderr": 0.21, "eval/gold_mean": 0.5}
    assert results_line(metrics) == "gold reward 0.5  KL from the reference 8.65 ± 0.21 nats"
