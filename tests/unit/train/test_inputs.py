"""What a job reads is checked before anything starts; each refusal is one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from marlhf_mega.config.hf_write import hf_config_from_model
from marlhf_mega.config.load import load_config, with_keys
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import Config
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.stream import SourcePart
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.platform import vllm
from marlhf_mega.train.inputs import read_inputs, with_time_to_write

ROOT = Path(__file__).parents[3]


def test_a_model_that_could_not_be_exported_is_refused_before_it_is_trained(refusal):
    line, what = refusal("sft", "model.qkv_bias=true", num_lines=2).splitlines()
    assert line == (
        "model.qkv_bias=True: the Hugging Face architecture llama always has False. Change it or "
        "model.architecture."
    )
    assert what.startswith("checkpoint.export_hf=true: writes such a folder at the end of the run.")


def test_fp8_says_what_is_missing(refusal):
    line = refusal("sft", "precision.fp8=hybrid")
    assert line.startswith("precision.fp8=hybrid: cannot be used here; there is no CUDA device")


def test_attention_kernels_are_chosen_where_there_are_several(refusal, monkeypatch):
    line = refusal("sft", "precision.attention_backend=flash")
    assert line == (
        "precision.attention_backend=flash: chooses a kernel of Transformer Engine, which cannot "
        "be used here; there is no CUDA device. Set it to auto."
    )
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    line = refusal("sft")
    assert line == (
        "precision.attention_backend=auto: needs NVTE_FUSED_ATTN=1; the environment has 0. Unset "
        "it, and choose the kernel by this key."
    )


def test_cuda_graphs_need_a_gpu(refusal):
    line = refusal("ppo", "rollout.cuda_graphs=true")
    assert line == "rollout.cuda_graphs=true: needs a CUDA device; there is none. Set it to false."


def test_an_engine_must_be_installed_and_know_the_model(refusal, monkeypatch):
    line = "rollout.engine=vllm: needs vLLM; it is not installed. Run `pip install "
    line += "'marlhf-mega[vllm]'`, or use rollout.engine=own."
    monkeypatch.setattr(vllm, "version", lambda: None)
    assert refusal("ppo", "rollout.engine=vllm") == line
    monkeypatch.setattr(vllm, "version", lambda: "0.32.0")
    line = refusal("ppo", "rollout.engine=vllm", "model.head_dim=16")
    assert line == (
        "rollout.engine=vllm: on CPUs vLLM takes heads of 32, 64, 80, 96, 112, 128, 160, 192, 224, "
        "256, 512 numbers; the model's have 16. Use rollout.engine=own."
    )
    options = ("model.head_dim=32", "model.architecture=mistral", "model.qk_norm=true")
    line = refusal("generate", "rollout.engine=vllm", *options, num_lines=2)
    assert line.startswith("model.qk_norm=True: the Hugging Face architecture mistral always has")
    assert line.endswith("rollout.engine=vllm: loads such a model. Use rollout.engine=own.")


def test_a_path_that_the_system_refuses(refusal):
    name = "x" * 300 + ".jsonl"
    line = f"{name}: cannot be used; File name too long. Fix it or use another path."
    assert refusal("sft", f"data.train_path={name}") == line


def test_a_missing_data_file(refusal):
    line = "data.train_path=/nowhere.jsonl: no such file. Give a .jsonl or .parquet file."
    assert refusal("sft", "data.train_path=/nowhere.jsonl") == line


def test_a_pattern_without_files(refusal, tmp_path):
    line = f"data.train_path={tmp_path}/*.jsonl: no such file. Give a .jsonl or .parquet file."
    assert refusal("sft", f"data.train_path={tmp_path}/*.jsonl") == line


def test_several_files_are_read_in_order_each_with_its_weight(job_files, tmp_path):
    rows = [{"prompt": str(i), "response": "a"} for i in range(3)]
    for name, part in {"b": rows[1:], "a": rows[:1]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", part)
    sources = [{"path": f"{tmp_path}/*.jsonl", "weight": 0.5}, str(job_files / "sft.jsonl")]
    keys = {"data.train_path": sources, "run.epochs": 2, "run.dir": tmp_path / "run"}
    keys |= {"tokenizer.path": job_files / "tok", "data.validation_path": sources[1:] * 2}
    inputs = read_inputs(with_keys(Config(), keys), "sft", 1)
    assert list(inputs.parts) == [SourcePart(1, 0.5), SourcePart(2, 0.5), SourcePart(16)]
    prompts = [inputs.tokenizer.decode(example.prompt_ids) for example in inputs.train[:3]]
    assert prompts == ["0", "1", "2"]
    assert (len(inputs.train), len(inputs.validation)) == (19, 32)


def test_a_bad_row_of_several_files_is_named_by_its_file(refusal, job_files, tmp_path):
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    line = refusal("sft", f"data.train_path=[{job_files / 'sft.jsonl'},{tmp_path / 'bad.jsonl'}]")
    assert line.startswith(f"{tmp_path / 'bad.jsonl'}:1: response: missing; ")


def test_an_empty_data_file(refusal, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    line = refusal("sft", f"data.train_path={tmp_path / 'empty.jsonl'}")
    assert line.endswith("must hold at least one row; the file is empty. Add rows.")


@pytest.mark.parametrize(
    ("text", "reason"), [("{oops\n", ":2: "), ('{"prompt": "a"}\n', ":2: response: ")]
)
def test_a_bad_row_is_named_by_file_and_line(refusal, tmp_path, text, reason):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n' + text)
    assert f"{path}{reason}" in refusal("sft", f"data.train_path={path}")


def test_a_prompt_longer_than_the_limit(refusal):
    line = refusal("sft", "data.max_prompt_tokens=4")
    assert line.startswith("data.max_prompt_tokens=4: must fit every prompt; that of ")


def test_a_reward_function_that_cannot_be_imported(refusal):
    line = refusal("ppo", "reward.source=marlhf_mega.data.toy:silver")
    assert line.startswith("reward.source=marlhf_mega.data.toy:silver: must name a function")


@pytest.mark.parametrize("command", ["ppo", "evaluate"])
def test_a_gold_rule_that_cannot_be_imported(refusal, command):
    assert refusal(command, "evaluate.gold=no.module:at_all").startswith("evaluate.gold=no.module")


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_rule_that_cannot_be_imported_is_refused_without_training_too(refusal, command):
    line = refusal(command, "reward.source=no.module:at_all")
    assert line.startswith("reward.source=no.module:at_all: must name a function")


def test_references_that_the_data_does_not_have(refusal):
    assert refusal("ppo", "reward.shaping=par", "reward.reference_field=drafts") == (
        "reward.reference_field=drafts: must name a field of the data rows, a text or a list of "
        "texts, for reward.shaping to compare with; the first row has none. Add it, or name "
        "another field."
    )


def test_a_template_whose_field_the_data_does_not_have(refusal, monkeypatch):
    monkeypatch.setattr("marlhf_mega.train.inputs.check_origins", lambda *_: None)
    term = "{source: runs/rm, template: '{response} {principle}'}"
    assert refusal("ppo", f"reward.source={term}") == (
        "reward.source=runs/rm: its template names principle, which must be a field of the data "
        "rows; the first row has none. Add it, or change the template."
    )


def test_a_parser_that_cannot_be_imported(refusal):
    line = refusal("ppo", "macro.rule=parsing", "macro.parser=nothing:here")
    assert line.startswith("macro.parser=nothing:here: must be `rules`, `python`")


def test_a_vocabulary_smaller_than_the_tokenizer(refusal):
    line = refusal("sft", "model.vocab_size=100")
    assert line.startswith("model.vocab_size=100: must hold the tokenizer's 400 tokens.")


def test_no_tokenizer(refusal):
    assert refusal("sft", "tokenizer.path=null").startswith("tokenizer.path: must be set unless")


def test_a_tokenizer_that_is_not_there(refusal):
    assert refusal("sft", "tokenizer.path=/nowhere").startswith(
        "tokenizer.path=/nowhere: must exist"
    )


@pytest.mark.parametrize("key", ["model.init", "reward.source", "critic.init"])
def test_a_model_that_is_not_there(refusal, key):
    line = refusal("ppo", f"{key}=/nowhere")
    assert line.startswith(f"{key}=/nowhere: must be a run directory or a Hugging Face folder")


def run_folder(path, tokenizer_fingerprint):
    (path / "checkpoints" / "step_000001").mkdir(parents=True)
    model = {"num_layers": 2, "vocab_size": 400}
    config = {"model": model, "tokenizer_fingerprint": tokenizer_fingerprint}
    (path / "config.yaml").write_text(json.dumps(config))
    return path


def test_a_run_that_is_given_as_a_hugging_face_folder(refusal, tmp_path):
    """Its weights would not be loaded, and nothing would say so."""
    folder = run_folder(tmp_path / "sft", "x")
    assert refusal("sft", f"model.hf_path={folder}") == (
        f"model.hf_path={folder}: must be a Hugging Face folder; it is a run directory. Set "
        f"model.init={folder} instead."
    )


def test_a_run_without_a_checkpoint(refusal, tmp_path):
    folder = run_folder(tmp_path / "rm", "x")
    (folder / "checkpoints" / "step_000001").rmdir()
    assert "must have a checkpoint; the run has none" in refusal("ppo", f"reward.source={folder}")


def test_a_reward_model_with_another_tokenizer(refusal, tmp_path):
    folder = run_folder(tmp_path / "rm", "another")
    line = refusal("ppo", f"reward.source={folder}")
    assert "must have been trained with the tokenizer of this run" in line


@pytest.fixture(scope="module")
def other_words(tmp_path_factory):
    """A Hugging Face folder of the same vocabulary size whose ids are other words."""
    folder = tmp_path_factory.mktemp("other")
    train_tokenizer(["zebra quartz xylophone vivid jigsaw waltz"] * 40, folder, vocab_size=300)
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 4000}
    config = hf_config_from_model(ModelConfig(**shape), head="sequence_classification")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("key", ["reward.source", "critic.init", "model.hf_path"])
def test_a_model_of_other_words_is_refused(refusal, other_words, key):
    line = refusal("ppo", f"{key}={other_words}")
    where = f"{key}={other_words}: must have been trained with the vocabulary of this run; id "
    assert line.startswith(where)
    assert line.endswith(" here. Use a model of the same tokenizer.")


@pytest.fixture
def small_model(job_files, tmp_path):
    """A Hugging Face folder with rows for fewer tokens than its tokenizer has."""
    folder = tmp_path / "small"
    shutil.copytree(job_files / "tok", folder)
    shape = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 390}
    (folder / "config.json").write_text(json.dumps(hf_config_from_model(ModelConfig(**shape))))
    return folder


def test_tokens_that_a_trained_model_lacks_may_not_be_used(refusal, small_model, tmp_path):
    tokenizer = Tokenizer.load(small_model)
    rare = next(i for i in range(390, 400) if tokenizer.encode(tokenizer.piece(i)) == [i])
    rows = [{"prompt": "a", "response": "a"}, {"prompt": "a", "response": tokenizer.piece(rare)}]
    write_jsonl(tmp_path / "d.jsonl", rows)
    options = [f"model.hf_path={small_model}", "tokenizer.path=null", "data.validation_path=null"]
    line = refusal("sft", f"data.train_path={tmp_path / 'd.jsonl'}", *options)
    assert line == (
        f"{tmp_path / 'd.jsonl'}:2: response: must have tokens of the model only, of which there "
        f"are 390; {tokenizer.piece(rare)!r} is id {rare}. Remove it, or use a model that has it."
    )
    write_jsonl(tmp_path / "d.jsonl", rows[:1])
    options += [f"data.train_path={tmp_path / 'd.jsonl'}", f"run.dir={tmp_path / 'run'}"]
    inputs = read_inputs(load_config(None, options), "sft", 1)
    assert inputs.config.model.vocab_size == 390
    assert inputs.train[0].response_ids == [*tokenizer.encode("a"), tokenizer.eos_id]


def test_the_tokens_of_every_text_must_be_in_the_model(refusal, small_model, tmp_path):
    path = small_model / "tokenizer_config.json"
    tokenizer = Tokenizer.load(small_model)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": tokenizer.piece(395)}))
    line = refusal("sft", f"model.hf_path={small_model}", "tokenizer.path=null")
    assert line == (
        "model.vocab_size=390: must hold the tokens that begin and end texts; "
        f"{tokenizer.piece(395)!r} is id 395. Use the tokenizer that belongs to the model."
    )


def test_a_save_has_the_time_that_its_bytes_take():
    """Llama 3 70B has 70,553,706,496 parameters; 14 bytes of each are saved, 2 are exported."""
    overrides = ["model.vocab_size=128256"]
    large = load_config(ROOT / "configs/llama3_70b_ppo.yaml", overrides, need_weights=False)
    watchdog = with_time_to_write(large, "ppo").watchdog
    assert watchdog.checkpoint_seconds == -(-2 * 70_553_706_496 * 14 // 250_000_000) == 7903
    assert watchdog.collective_seconds == 7963
    assert watchdog.export_seconds is None, "282 GB take 1129 s, less than any phase may"
    assert with_time_to_write(large, "sft").watchdog.checkpoint_seconds == 3952
    assert with_time_to_write(large, "generate") == large
    for key in ("watchdog.seconds=null", "watchdog.checkpoint_seconds=5"):
        set_by_user = load_config(
            ROOT / "configs/llama3_70b_ppo.yaml", [*overrides, key], need_weights=False
        )
        assert with_time_to_write(set_by_user, "ppo") == set_by_user


def test_another_policy_to_compare_with(refusal, job_files, tmp_path):
    against = ("reward.source=marlhf_mega.data.toy:gold_reward", "--against")
    missing = tmp_path / "missing"
    assert refusal("evaluate", *against, str(missing)) == (
        f"evaluate.against={missing}: must be a run directory or a Hugging Face folder; no such "
        "folder. Check the path, or train that model first."
    )
    other = tmp_path / "other"
    shutil.copytree(job_files / "other_tok", other)
    shape = {"vocab_size": 390, "num_layers": 4}
    (other / "config.json").write_text(json.dumps(hf_config_from_model(ModelConfig(**shape))))
    line = refusal("evaluate", *against, str(other))
    assert line.startswith(
        f"evaluate.against={other}: must have been trained with the vocabulary of this run; "
    )
    shutil.copytree(job_files / "tok", other, dirs_exist_ok=True)
    shape["vocab_size"] = 400
    (other / "config.json").write_text(json.dumps(hf_config_from_model(ModelConfig(**shape))))
    save_file({"score.weight": torch.zeros(1, 128)}, other / "model.safetensors")
    assert refusal("evaluate", *against, str(other)) == (
        f"evaluate.against={other}: must be a policy; it is a reward model. Give the run or "
        "folder of a language model."
    )
    save_file({"model.norm.weight": torch.zeros(128)}, other / "model.safetensors")
    assert refusal("evaluate", *against, str(other)) == (
        f"evaluate.against={other}: must have the architecture of the policy, model.num_layers=2; "
        "its own is 4. Evaluate each by itself instead."
    )
    assert refusal("evaluate", "--against", str(other)) == (
        f"evaluate.against={other}: needs a judge of the answers; reward.source and evaluate.gold "
        "are not set. Set one of them."
    )
