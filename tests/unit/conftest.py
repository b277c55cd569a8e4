import pytest

from marlhf_mega.cli import main
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def job_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    train_tokenizer(toy.tokenizer_text(1, 300), folder / "other_tok", vocab_size=390)
    write_jsonl(folder / "sft.jsonl", toy.generate_sft(0, 16))
    write_jsonl(folder / "pairs.jsonl", toy.generate_preferences(0, 16))
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 16))
    return folder


@pytest.fixture
def refusal(job_files, tmp_path, capsys, monkeypatch):
    """Run a command that must be refused; return its line on stderr."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    run_dir = tmp_path / "run"

    def refuse(command, *overrides, world_size=1, num_lines=1):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        data = {"sft": "sft", "reward": "pairs"}.get(command, "prompts")
        defaults = [
            f"run.dir={run_dir}",
            f"tokenizer.path={job_files / 'tok'}",
            f"data.train_path={job_files / data}.jsonl",
            f"data.validation_path={job_files / data}.jsonl",
        ]
        if command == "ppo":
            defaults.append("reward.source=marlhf_mega.data.toy:gold_reward")
        assert main([command, *defaults, *overrides]) == 2
        assert not run_dir.exists()
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == num_lines, captured.err
        return captured.err.strip()

    return refuse
