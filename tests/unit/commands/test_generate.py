"""Answers that are there, and settings that would change them."""

import json

from marlhf_mega.cli import main
from marlhf_mega.config.schema import Config
from marlhf_mega.train.resume import settings_of


def test_a_check_knows_the_answers_that_are_there(job_files, tmp_path, capsys):
    noted = {"config": settings_of(Config()), "data_hash": "another"}
    (tmp_path / "responses").mkdir()
    (tmp_path / "responses" / "settings.json").write_text(json.dumps(noted))
    arguments = [
        "generate",
        f"run.dir={tmp_path}",
        f"data.validation_path={job_files}/prompts.jsonl",
    ]
    arguments += [f"tokenizer.path={job_files / 'tok'}", "--check"]
    allowed = "checkpoint.allow_changed=[model,data,tokenizer]"
    assert main([*arguments, "rollout.top_k=7", allowed]) == 2
    assert capsys.readouterr().err.startswith("rollout.top_k=7: must be as in the answers that are")
    assert main([*arguments, allowed]) == 2
    assert "the prompts of the answers that are there, sha256 another; " in capsys.readouterr().err
    assert main([*arguments, "checkpoint.resume=never"]) == 0
