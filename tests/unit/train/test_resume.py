"""Which settings may change between a checkpoint and the run that resumes from it."""

import json
import os
import time

import pytest

from marlhf_mega.checkpoint import manifest
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.train.resume import (
    check_resume,
    check_same_held_out,
    check_settings,
    settings_of,
    starts_afresh,
)

SAVED = settings_of(Config())


def changed(**sections):
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"run": {"seed": 7}}, "run.seed=7: must be as in the checkpoint, 1234"),
        ({"macro": {"n": 3}}, "macro.n=3: must be as in the checkpoint, 5"),
        ({"ppo": {"clip_range": 0.1}}, "ppo.clip_range=0.1: must be as in the checkpoint, 0.2"),
        ({"policy": {"lr": 2e-5}}, "policy.lr=2e-05: must be as in the checkpoint, 1e-05"),
    ],
)
def test_a_setting_that_matters_is_refused_by_name_with_both_values(sections, message):
    with pytest.raises(ConfigError, match="must be as in the checkpoint") as caught:
        check_settings(SAVED, changed(**sections), "ppo")
    assert str(caught.value) == (
        f"{message}. Set it back, name it in checkpoint.allow_changed, or use another run.dir."
    )


def test_answers_of_other_settings_are_refused_but_not_for_the_batch_size():
    check_settings(SAVED, changed(rollout={"batch_size": 8}, policy={"lr": 1.0}), "generate")
    with pytest.raises(ConfigError, match="rollout.top_k=7: must be as in the answers that are"):
        check_settings(SAVED, changed(rollout={"top_k": 7, "batch_size": 8}), "generate")


def test_how_it_is_computed_may_change():
    config = changed(
        run={"steps": 9, "dir": "elsewhere", "name": "other"},
        parallel={"tensor_size": 2},
        data={"train_path": "moved.jsonl"},
        rollout={"pipeline_size": 1, "slots": 4},
        ppo={"microbatch_size": 1},
        evaluate={"interval": 3},
        checkpoint={"interval": 3},
        logging={"samples": 0},
    )
    check_settings(SAVED, config, "ppo")


def test_settings_of_other_jobs_do_not_matter():
    check_settings(SAVED, changed(macro={"n": 3}), "sft")


@pytest.mark.parametrize("allowed", ["policy.lr", "policy"])
def test_a_change_that_is_allowed_by_name_is_made(allowed):
    config = changed(policy={"lr": 1.0}, checkpoint={"allow_changed": [allowed]})
    check_settings(SAVED, config, "ppo")


def write_checkpoint(run_dir, step, config, *, data_hash="abc", **more):
    """Write a checkpoint's tables; the weights are nowhere, since nothing may read them."""
    folder = run_dir / "checkpoints" / f"step_{step:06d}"
    folder.mkdir(parents=True)
    state = {"config": settings_of(config), "stream": {"data_hash": data_hash}} | more
    (folder / "state.json").write_text(json.dumps({"format": 1, "state": state}))
    files = {"state.json": manifest.facts(folder / "state.json")}
    weights = {"policy/__0_0.distcp": {"bytes": 9, "sha256": "0"}}
    (folder / "manifest.json").write_text(manifest.make(files | weights, format=1, step=step))
    (folder.parent / "latest").write_text(folder.name)
    return folder


def going_on(run_dir, resume="auto", **sections):
    return changed(run={"dir": run_dir}, checkpoint={"resume": resume}, **sections)


def test_before_a_start_the_newest_checkpoint_decides(tmp_path):
    write_checkpoint(tmp_path, 2, changed(ppo={"epochs": 2}))
    newest = write_checkpoint(tmp_path, 4, changed(ppo={"epochs": 3}))
    check_resume(going_on(tmp_path, ppo={"epochs": 3}), "ppo", "abc", "words", "prompts")
    with pytest.raises(ConfigError, match=r"ppo.epochs=2: must be as in the checkpoint, 3\."):
        check_resume(going_on(tmp_path, ppo={"epochs": 2}), "ppo", "abc", "words", "prompts")
    # What a damaged checkpoint says counts for nothing, here as for a start.
    text = (newest / "state.json").read_text()
    (newest / "state.json").write_text(text.replace('"epochs": 3', '"epochs": 4'))
    with pytest.raises(ConfigError, match=r"ppo.epochs=4: must be as in the checkpoint, 2\."):
        check_resume(going_on(tmp_path, ppo={"epochs": 4}), "ppo", "abc", "words", "prompts")


def test_before_a_start_another_data_file_is_refused_with_both_hashes(tmp_path):
    write_checkpoint(tmp_path, 4, Config(), data_hash="abc")
    config = going_on(tmp_path, data={"train_path": "new.jsonl"})
    with pytest.raises(ConfigError) as caught:
        check_resume(config, "sft", "def", "words", "prompts")
    assert str(caught.value) == (
        "data.train_path=new.jsonl: must hold the rows of the checkpoint, sha256 abc; it is def. "
        "Use the same file or another run.dir."
    )


def test_before_a_start_other_held_out_data_is_refused_where_results_are_compared(tmp_path):
    first = {"values": {"eval/loss": [1.0]}, "data_hash": "abc"}
    write_checkpoint(tmp_path, 4, Config(), first_results=first)
    data = {"data": {"validation_path": "new.jsonl"}}

    def refusal(**checkpoint):
        config = changed(run={"dir": tmp_path}, checkpoint=checkpoint, **data)
        check_same_held_out(config, "abc")
        with pytest.raises(ConfigError) as caught:
            check_same_held_out(config, "def")
        return str(caught.value)

    what = (
        "data.validation_path=new.jsonl: must hold the rows of the checkpoint, sha256 abc; it is "
        "def. Use the same file, "
    )
    assert refusal() == (
        f"{what}or name the key in checkpoint.allow_changed to go on without changes since the "
        "start."
    )
    allowed = {"allow_changed": ["data.validation_path"]}
    assert refusal(**allowed, keep_best="eval/loss") == (
        f"{what}by which checkpoint.keep_best=eval/loss was found."
    )
    for free in (allowed, {"resume": "never"}):
        check_same_held_out(changed(run={"dir": tmp_path}, checkpoint=free, **data), "def")
    for known in (None, {"values": {}}):  # none was there, or it was not noted which
        write_checkpoint(tmp_path / str(known), 4, Config(), first_results=known)
        check_same_held_out(changed(run={"dir": tmp_path / str(known)}, **data), "def")


def test_before_a_start_another_vocabulary_is_refused(tmp_path):
    write_checkpoint(tmp_path, 4, Config())
    (tmp_path / "config.yaml").write_text("tokenizer_fingerprint: words\n")
    checkpoint = {"resume": "auto", "allow_changed": ["tokenizer"]}
    config = changed(run={"dir": tmp_path}, checkpoint=checkpoint, tokenizer={"path": "tok"})
    check_resume(config, "sft", "abc", "words", "prompts")
    with pytest.raises(ConfigError) as caught:
        check_resume(config, "sft", "abc", "other words", "prompts")
    assert str(caught.value) == (
        "tokenizer.path=tok: must hold the vocabulary of the checkpoint (words); it is other words. "
        f"The run keeps a copy in {tmp_path / 'tokenizer'}: use that, or another run.dir."
    )


def test_before_a_start_only_a_resume_needs_a_checkpoint(tmp_path):
    check_resume(going_on(tmp_path), "sft", "abc", "words", "prompts")
    with pytest.raises(ConfigError, match="checkpoint.resume=must: .* has no checkpoint that can"):
        check_resume(going_on(tmp_path, "must"), "sft", "abc", "words", "prompts")
    write_checkpoint(tmp_path, 4, Config())
    check_resume(going_on(tmp_path, "must"), "sft", "abc", "words", "prompts")
    check_resume(going_on(tmp_path, "never", policy={"lr": 1.0}), "sft", "def", "words", "prompts")


def test_never_is_about_earlier_launches_only(tmp_path, monkeypatch):
    config = changed(run={"dir": tmp_path}, checkpoint={"resume": "never"})
    assert starts_afresh(config)
    latest = tmp_path / "checkpoints" / "latest"
    latest.parent.mkdir()
    latest.touch()
    assert starts_afresh(config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not starts_afresh(config)  # written by this launch
    long_ago = time.time() - 7 * 24 * 3600
    os.utime(latest, (long_ago, long_ago))
    assert starts_afresh(config)
    assert not starts_afresh(changed(run={"dir": tmp_path}))
