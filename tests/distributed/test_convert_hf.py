"""tools/convert_hf.py and a run that starts from a Hugging Face folder, as a user runs them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from tests.distributed.ranks import JOB, run_forked

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert_hf.py"
AVERAGE = ROOT / "tools" / "average_models.py"
MAKE = """
import sys, torch, transformers
torch.manual_seed(0)
shape = dict(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
             num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=128,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)
config = transformers.LlamaConfig(**shape)
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1], max_shard_size="40KB")
config = transformers.LlamaConfig(**shape, num_labels=1)
transformers.LlamaForSequenceClassification(config).save_pretrained(sys.argv[2])
"""


def in_transformers(program, *arguments):
    """Run a program in a process without Megatron; return its last line as JSON, if it has one."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def run(program, *arguments, ranks=1, code=0):
    offline = {"HF_HUB_OFFLINE": "1"}
    done = run_forked(program, *arguments, ranks=ranks, environment=offline)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-5000:]
    return done


def convert(*arguments, code=0):
    """Run the tool; return the JSON of its last line."""
    return json.loads(run(TOOL, *arguments, code=code).stdout.splitlines()[-1])


def tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hold a language model `model` and a reward model `judge`, with a tokenizer each."""
    folder = tmp_path_factory.mktemp("convert")
    in_transformers(MAKE, folder / "model", folder / "judge")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    for name in ("model", "judge"):
        shutil.copytree(folder / "tok", folder / name, dirs_exist_ok=True)
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 32))
    return folder


def test_verify_agrees_with_transformers_on_four_ranks(folder):
    layout = ["--tensor-size", 2, "--pipeline-size", 2, "--sequence-parallel"]
    found = convert("verify", folder / "model", *layout)
    assert found["max_logit_diff"] < 1e-5
    assert found["generated_equal"] is True
    assert found["export_exact"] is True
    assert found["tensors"] == 39
    assert found["layout"].startswith("4 ranks: TP2 x PP2")


def test_verify_of_a_reward_model_in_an_interleaved_pipeline(folder):
    layout = ["--pipeline-size", 2, "--virtual-pipeline-size", 2]
    found = convert("verify", folder / "judge", *layout)
    assert found["max_logit_diff"] < 1e-5
    assert found["generated_equal"] is None
    assert found["export_exact"] is True


def test_verify_fails_where_transformers_says_something_else(folder, tmp_path):
    """A difference that is forced: nothing is as exact as the tolerance of nought."""
    found = convert("verify", folder / "model", "--tolerance", 0, code=1)
    assert found["max_logit_diff"] > 0


def test_import_and_export_keep_every_bit(folder, tmp_path):
    run_dir, back = tmp_path / "run", tmp_path / "back"
    convert("import", folder / "model", run_dir, "--tensor-size", 2)
    found = convert("export", run_dir, back, "--pipeline-size", 2)
    assert found["tensors"] == 39
    expected = tensors(folder / "model")
    assert tensors(back).keys() == expected.keys()
    assert all(tensors(back)[name].equal(tensor) for name, tensor in expected.items())
    config = json.loads((back / "config.json").read_text())
    assert [config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")] == [1, 2, 0]
    assert (back / "tokenizer.json").is_file()
    assert convert("compare", run_dir, folder / "model")["different"] == {}


def test_a_run_is_averaged_after_its_export(folder, tmp_path):
    convert("import", folder / "model", tmp_path / "run")
    run(AVERAGE, tmp_path / "out", tmp_path / "run", folder / "model", "--weights", "0.75,0.25")
    expected, found = tensors(folder / "model"), tensors(tmp_path / "out")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_number_format_is_kept(folder, tmp_path, dtype):
    half = tmp_path / "half"
    shutil.copytree(folder / "judge", half)
    values = {name: t.to(dtype) for name, t in load_file(half / "model.safetensors").items()}
    save_file(values, half / "model.safetensors", metadata={"format": "pt"})
    convert("import", half, tmp_path / "run")
    convert("export", tmp_path / "run", tmp_path / "back", "--role", "reward")
    found = tensors(tmp_path / "back")
    assert all(found[name].dtype == dtype for name in values)
    assert all(found[name].equal(tensor) for name, tensor in values.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == str(dtype).removeprefix("torch.")
    assert config["pad_token_id"] == 0


def test_compare_names_what_differs(folder, tmp_path):
    shutil.copytree(folder / "judge", tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    changed = load_file(file)
    changed["score.weight"][0, 3] += 0.5
    del changed["model.norm.weight"]
    save_file(changed, file, metadata={"format": "pt"})
    found = convert("compare", folder / "judge", tmp_path / "other", code=1)
    assert found["different"] == {
        "model.norm.weight": "only in one",
        "score.weight": "largest difference 0.5",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["import", "{folder}/nothing", "{tmp}/run"],
            "model.hf_path={folder}/nothing: must be a run directory or a Hugging Face folder; no "
            "such folder. Check the path, or train that model first.",
        ),
        (
            ["import", "none", "{tmp}/run"],
            "model.hf_path={here}/none: must be a run directory or a Hugging Face folder; no such "
            "folder. Check the path, or train that model first.",
        ),
        (
            ["import", "{folder}/model", "{folder}/tok"],
            "{folder}/tok: must be a new folder; it is not empty. Use another.",
        ),
        (
            ["export", "{folder}/model", "{tmp}/out"],
            "{folder}/model: must be a run directory; it is a Hugging Face folder. Use another.",
        ),
        (
            ["verify", "{folder}/model", "--tensor-size", "3"],
            "parallel.tensor_size=3: must divide model.num_attention_heads=8. Use 1, 2, 4 or 8.",
        ),
    ],
)
def test_wrong_requests_are_refused_in_one_line(folder, tmp_path, arguments, message):
    filled = [a.format(folder=folder, tmp=tmp_path) for a in arguments]
    done = run(TOOL, *filled, code=2)
    assert done.stderr.splitlines()[0] == message.format(folder=folder, here=Path.cwd())
    assert not any(tmp_path.iterdir())


def test_a_folder_without_tokenizer_needs_one_to_become_a_run(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder / "model", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    done = run(TOOL, "import", bare, tmp_path / "run", code=2)
    assert done.stderr == (
        f"tokenizer.path={bare}: must hold tokenizer.json or tokenizer.model; found neither. Give "
        "a tokenizer folder or a SentencePiece .model file.\n"
    )
    assert not (tmp_path / "run").exists()
    convert("import", bare, tmp_path / "run", "--tokenizer", folder / "tok")


def test_a_damaged_folder_is_refused_before_any_rank_starts(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "cut")
    shard = max((tmp_path / "cut").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    done = run(TOOL, "verify", tmp_path / "cut", code=2)
    assert f"{shard.name} must be a complete safetensors file" in done.stderr


def ppo(folder, run_dir, *options, ranks=4, code=0):
    return run(
        JOB,
        "ppo",
        f"model.hf_path={folder / 'model'}",
        f"run.dir={run_dir}",
        f"data.train_path={folder / 'prompts.jsonl'}",
        *("data.max_prompt_tokens=48", "rollout.max_response_tokens=12", "run.steps=2"),
        *("rollout.batch_size=8", "ppo.minibatch_size=8", "policy.lr=1e-3", "critic.lr=1e-3"),
        f"reward.source={folder / 'judge'}",
        *options,
        ranks=ranks,
        code=code,
    )


def test_a_policy_trained_from_a_folder_answers_in_transformers_as_it_was_trained(folder, tmp_path):
    """The export during the run equals the checkpoint, and transformers agrees with us on it."""
    settings = json.loads((folder / "model" / "generation_config.json").read_text())
    settings |= {"top_p": 0.9, "do_sample": True}
    (folder / "model" / "generation_config.json").write_text(json.dumps(settings))
    layout = ["parallel.tensor_size=2", "parallel.pipeline_size=2", "checkpoint.import_once=true"]
    ppo(folder, tmp_path / "run", *layout, "checkpoint.export_from_first=true")
    exported = tmp_path / "run" / "hf"
    assert convert("compare", tmp_path / "run", exported)["different"] == {}
    found = convert("verify", exported, "--pipeline-size", 2)
    assert found["max_logit_diff"] < 1e-5
    assert found["generated_equal"] is True
    assert found["text_equal"] is True
    assert json.loads((exported / "generation_config.json").read_text()) == settings
    before, after = tensors(folder / "model"), tensors(exported)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], tensor) for name, tensor in after.items())


def test_one_replica_reads_for_the_others(folder, tmp_path):
    """Two data-parallel ranks train from what one of them read, as if both had."""
    both, once = tmp_path / "both", tmp_path / "once"
    ppo(folder, both, "checkpoint.export_hf=false", ranks=2)
    ppo(folder, once, "checkpoint.export_hf=false", "checkpoint.import_once=true", ranks=2)
    one, other = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (both, once)
    )
    for name in ("policy/loss", "critic/loss", "rollout/score_mean", "policy/grad_norm"):
        assert [m[name] for m in one] == [m[name] for m in other]
    # A critic has a reward model's shape, but it predicts returns.
    assert_no_reward_model(folder, once, "a policy and its critic", tmp_path / "next")


def test_a_language_model_is_no_reward_model(folder, tmp_path):
    assert_no_reward_model(folder, folder / "model", "a language model", tmp_path / "run")


def assert_no_reward_model(folder, source, kind, run_dir):
    done = ppo(folder, run_dir, f"reward.source={source}", ranks=1, code=2)
    assert done.stderr.splitlines()[-1] == (
        f"reward.source={source}: must be a reward model; it is {kind}. Train one from it with "
        "`marlhf reward`."
    )
    assert not run_dir.exists()


SCORE = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
rows = json.load(open(sys.argv[2]))
width = max(map(len, rows))
pad = model.config.pad_token_id
batch = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
with torch.no_grad():
    together = model(batch, attention_mask=mask.long()).logits[:, 0]
    alone = torch.cat([model(torch.tensor([row])).logits[:, 0] for row in rows])
print(json.dumps([together.tolist(), alone.tolist()]))
"""


def test_an_exported_reward_model_scores_a_padded_batch(folder, tmp_path):
    """Of a model that began here: transformers needs the padding id, and it is not the end's."""
    pairs = [{"prompt": "a b", "chosen": "c", "rejected": "d e f"}] * 8
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    run(
        *(JOB, "reward", f"run.dir={tmp_path / 'rm'}", "run.steps=1"),
        f"tokenizer.path={folder / 'tok'}",
        f"data.train_path={tmp_path / 'pairs.jsonl'}",
        *("model.hidden_size=32", "model.ffn_hidden_size=48", "reward_model.batch_size=8"),
    )
    rows = [[5, 9, 2], [8, 30, 41, 77, 100, 2], [1, 12, 2]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    together, alone = in_transformers(SCORE, tmp_path / "rm" / "hf", tmp_path / "rows.json")
    assert together == pytest.approx(alone, abs=1e-6)
    config = json.loads((tmp_path / "rm" / "hf" / "config.json").read_text())
    assert config["pad_token_id"] != config["eos_token_id"] == 2
