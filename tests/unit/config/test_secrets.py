"""Secrets stay in the environment: neither configurations nor logs contain them."""

import logging

import pytest

from marlhf_mega.cli import main
from marlhf_mega.config.load import ConfigError, load_config
from marlhf_mega.config.secrets import RedactingFormatter, redact


@pytest.fixture(autouse=True)
def _secret(monkeypatch):
    monkeypatch.setenv("MARLHF_REWARD_TOKEN", "s3cret-value")
    monkeypatch.setenv("SHORT_TOKEN", "a")


def test_a_secret_is_replaced_by_its_name():
    assert redact("Bearer s3cret-value, and a word") == "Bearer <MARLHF_REWARD_TOKEN>, and a word"


@pytest.mark.parametrize(
    "value", ["http://host/?key=${oc.env:MARLHF_REWARD_TOKEN}", "s3cret-value"]
)
def test_a_secret_in_the_configuration_is_refused_and_not_shown(value, capsys):
    assert main(["ppo", "--print-config", f"reward.source=[{{source: '{value}'}}]"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "s3cret" not in captured.err
    assert captured.err.startswith("reward.source.0.source=")
    assert "must not contain a secret, which would be saved with the run" in captured.err


def test_a_secret_in_the_file_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("logging: {wandb: 's3cret-value'}\n")
    with pytest.raises(
        ConfigError, match=r"^logging\.wandb=<MARLHF_REWARD_TOKEN>: must not contain"
    ):
        load_config(path)


def test_a_secret_in_a_log_line_or_traceback_is_replaced():
    formatter = RedactingFormatter("%(message)s")
    try:
        raise RuntimeError("refused s3cret-value")
    except RuntimeError as error:
        exc_info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("n", 20, "f", 1, "token %s", ("s3cret-value",), exc_info)
    line = formatter.format(record)
    assert line.startswith("token <MARLHF_REWARD_TOKEN>\n")
    assert "refused <MARLHF_REWARD_TOKEN>" in line
    assert "s3cret" not in line


@pytest.mark.parametrize(
    ("name", "value", "is_secret"),
    [
        ("HF_TOKEN", "hf_abcdef", True),
        ("OPENAI_API_KEY", "sk-abcdef", True),
        ("AWS_SECRET_ACCESS_KEY", "abcdefgh", True),
        ("DB_PASSWORD", "abcdefgh", True),
        ("TOKENIZERS_PARALLELISM", "falsefalse", False),
        ("MAX_TOKENS", "abcdefgh", False),
        ("NUM_TOKEN", "100000", False),
        ("TOKEN_BUDGET", "1.5e+09", False),
    ],
)
def test_what_is_a_secret(monkeypatch, name, value, is_secret):
    monkeypatch.setenv(name, value)
    assert redact(f"it is {value}.") == (f"it is <{name}>." if is_secret else f"it is {value}.")
