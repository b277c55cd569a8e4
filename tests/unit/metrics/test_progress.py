import io
import logging
import math

import pytest
from rich.console import Console

from marlhf_mega.config.schema import Config, PPOConfig, RolloutConfig, SftConfig
from marlhf_mega.metrics.progress import (
    Progress,
    batch_arithmetic,
    number,
    show_batch_arithmetic,
    show_before_after,
)

PPO_METRICS = {
    "rollout/score_mean": 1.23456,
    "policy/kl": 0.00012,
    "rollout/response_tokens": 31.0,
    "policy/loss": 9.0,
}


def screen(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=160)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_each_step_is_one_plain_line_in_the_log(caplog):
    console = screen(terminal=False)
    with caplog.at_level(logging.INFO), Progress("ppo", num_steps=20, console=console) as progress:
        progress.update(11, PPO_METRICS)
    assert [record.message for record in caplog.records] == [
        "ppo step 12/20  score 1.235  KL 1.20e-04  length 31"
    ]
    assert written(console) == ""


def test_on_a_terminal_a_bar_shows_the_numbers_and_the_log_stays_empty(caplog):
    console = screen(terminal=True)
    with caplog.at_level(logging.INFO), Progress("ppo", num_steps=20, console=console) as progress:
        progress.update(11, PPO_METRICS)
    assert "12/20" in written(console)
    assert "score 1.235" in written(console)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (31.0, "31"),
        (-0.12345, "-0.1235"),
        (1234.5, "1234"),
        (45678.9, "45,679"),
        (0.00001, "1.00e-05"),
        (3.2e9, "3.20e+09"),
        (math.nan, "nan"),
        (None, "-"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_ppo_batch_arithmetic_by_hand():
    config = Config(
        rollout=RolloutConfig(batch_size=96, samples_per_prompt=4),
        ppo=PPOConfig(epochs=2, minibatch_size=48, microbatch_size=5),
    )
    rows = batch_arithmetic(config, "ppo", data_size=4)
    assert {what: count for what, _, count in rows} == {
        "prompts per PPO step": 24,
        "sequences per PPO step": 96,
        "sequences per rank": 24,
        "optimizer steps per PPO step": 4,
        "microbatches per optimizer step and rank": 3,  # 12 sequences: 5 + 5 + 2
    }


def test_sft_batch_arithmetic_by_hand():
    config = Config(sft=SftConfig(batch_size=32, microbatch_size=4))
    rows = batch_arithmetic(config, "sft", data_size=2)
    assert [count for _, _, count in rows] == [32, 16, 4]


def test_tables_show_every_row():
    console = screen(terminal=False)
    show_batch_arithmetic(batch_arithmetic(Config(), "reward", data_size=1), console=console)
    show_before_after([("gold reward", 0.5, 0.875), ("KL", None, 3.0)], console=console)
    text = written(console)
    assert "pairs per optimizer step" in text
    gold = next(line for line in text.splitlines() if "gold reward" in line)
    assert gold.split() == ["gold", "reward", "0.5", "0.875", "+0.375"]
    assert next(x for x in text.splitlines() if "KL" in x).split() == ["KL", "-", "3", "-"]
