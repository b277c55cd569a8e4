"""What a run directory holds for the runs that resume from it."""

import shutil
from types import SimpleNamespace

import torch

from marlhf_mega.config.origin import run_fingerprint
from marlhf_mega.config.schema import Config
from marlhf_mega.data import toy
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.train.output import write_run_directory

MESH = SimpleNamespace(
    describe=lambda: "1 rank", platform=SimpleNamespace(default_dtype=torch.bfloat16)
)


def test_the_tokenizer_of_a_run_puts_in_front_of_prompts_what_the_given_one_does(tmp_path):
    """A folder says it in tokenizer_config.json, beside the file that the config may name."""
    train_tokenizer(toy.tokenizer_text(0, 300), tmp_path / "without", vocab_size=400)
    (tmp_path / "with").mkdir()
    shutil.copy(tmp_path / "without" / "tokenizer.model", tmp_path / "with")
    # The last one finds the files of an earlier run in its directory.
    for name, run, prefix in (
        ("without/tokenizer.model", "one", []),
        ("with/tokenizer.model", "two", [1]),
        ("without", "three", []),
        ("with/tokenizer.model", "three", [1]),
        ("three/tokenizer/tokenizer.model", "three", [1]),
    ):
        given, run_dir = Tokenizer.load(tmp_path / name), tmp_path / run
        config = Config.model_validate({"run": {"dir": run_dir}})
        write_run_directory(config, given, tmp_path / name, MESH)
        kept = Tokenizer.load(run_dir / "tokenizer")
        assert kept.prompt_prefix == given.prompt_prefix == prefix
        assert "\ndtype: bfloat16\n" in (run_dir / "config.yaml").read_text()
        assert run_fingerprint(run_dir) == kept.fingerprint() == given.fingerprint()
