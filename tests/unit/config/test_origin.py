"""What lies at a path: a run directory, a Hugging Face folder, or neither."""

import json

import pytest
import yaml

from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.origin import find_origin, run_fingerprint

SHAPE = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 100}


def run_directory(folder, *, saved=True, **values):
    (folder / "checkpoints").mkdir(parents=True)
    if saved:
        (folder / "checkpoints" / "step_000001").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def hugging_face_folder(folder):
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_run_says_its_model_and_tokenizer(tmp_path):
    folder = run_directory(tmp_path / "run", model=SHAPE, tokenizer_fingerprint="abc")
    origin = find_origin(folder, key="model.init")
    assert (origin.path, origin.is_run, origin.tokenizer_fingerprint) == (folder, True, "abc")
    assert origin.model == ModelConfig(**SHAPE)
    assert run_fingerprint(folder) == "abc"
    assert run_fingerprint(run_directory(tmp_path / "old", model=SHAPE)) is None
    assert run_fingerprint(tmp_path) is None


def test_a_hugging_face_folder_keeps_what_the_user_may_set(tmp_path):
    base = ModelConfig(max_positions=32)
    origin = find_origin(hugging_face_folder(tmp_path / "hf"), key="model.hf_path", base=base)
    assert (origin.is_run, origin.tokenizer_fingerprint) == (False, None)
    assert (origin.model.num_layers, origin.model.max_positions) == (5, 32)


def test_a_run_with_adapters_says_where_its_other_weights_are(tmp_path):
    lora = {"lora": {"rank": 4}}
    first = run_directory(tmp_path / "first", model=SHAPE | lora, run={"seed": 7})
    second = run_directory(
        tmp_path / "second", model=SHAPE | lora | {"init": str(first)}, run={"seed": 8}
    )
    origin = find_origin(second, key="model.init")
    assert origin.lora.rank == 4
    assert origin.model == ModelConfig(**SHAPE, init=str(first))
    assert (origin.base.path, origin.base.lora.rank) == (first, 4)
    assert (origin.base.base, origin.base.seed) == (None, 7)
    third = run_directory(
        tmp_path / "third",
        model=SHAPE | lora | {"hf_path": str(tmp_path / "gone")},
        run={"seed": 9},
    )
    with pytest.raises(ValueError, match="no such folder") as caught:
        find_origin(third, key="model.init")
    assert str(caught.value).startswith(f"model.hf_path of {third}={tmp_path / 'gone'}: ")


def test_a_run_that_also_has_a_config_json_is_a_run(tmp_path):
    folder = hugging_face_folder(run_directory(tmp_path / "run", model=SHAPE))
    assert find_origin(folder, key="model.init").model.num_layers == 3


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path, "no such folder"),
        (lambda path: path.mkdir(), "has neither config.yaml nor config.json"),
        (lambda path: run_directory(path, saved=False, model=SHAPE), "must have a checkpoint"),
        (lambda path: run_directory(path), "its config.yaml must describe the model; 'model'"),
        (lambda path: run_directory(path, model={"nope": 1}), "must describe the model; 1 valid"),
        (
            lambda path: run_directory(path, model=SHAPE, reward_model={"latent_size": 8}),
            "must be a model that needs no user; this one scores by what a user prefers, "
            "reward_model.latent_size=8. Use another run.",
        ),
    ],
)
def test_what_cannot_be_used_is_named_with_its_key(tmp_path, make, reason):
    path = tmp_path / "given"
    make(path)
    with pytest.raises(ValueError, match=".") as caught:
        find_origin(path, key="reward.source")
    assert str(caught.value).startswith(f"reward.source={path}: ")
    assert reason in str(caught.value)
