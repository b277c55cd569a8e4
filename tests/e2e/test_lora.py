"""From supervised fine-tuning to PPO with adapters, each job from the run before, and the tools."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from marlhf_mega.checkpoint import manifest
from marlhf_mega.checkpoint.metadata import read_tensors
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from tests.distributed.ranks import JOB, run_forked

ROOT = Path(__file__).parents[2]
SHAPE = ("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=64")
DROPS_NOTHING = "model.lora.dropout=0"
TP2, ONE = "parallel.tensor_size=2", "rollout.tensor_size=1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    write_jsonl(folder / "sft.jsonl", toy.generate_sft(0, 32))
    write_jsonl(folder / "pairs.jsonl", toy.generate_preferences(0, 32))
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 32))
    write_jsonl(folder / "held_out.jsonl", toy.generate_prompts(0, 6, held_out=True))
    return folder


def run(job, data, run_dir, *options, ranks=1, check=True):
    done = run_forked(
        JOB,
        job,
        f"run.dir={run_dir}",
        *(f"tokenizer.path={data / 'tok'}", "data.max_prompt_tokens=64", "run.steps=3"),
        *("model.lora.rank=2", "model.lora.dropout=0.1", "logging.tensorboard=false", *options),
        ranks=ranks,
    )
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return done


def numbers(run_dir):
    """Every metric that measures no time and no move."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {
            k: v
            for k, v in json.loads(line).items()
            if not re.match("time/|perf/|.*reshard|.*_per_", k)
        }
        for line in lines
    ]


def close(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def sft_of(data):
    train = (f"data.train_path={data / 'sft.jsonl'}", "sft.batch_size=8", "policy.lr=1e-2")
    return [*train, *SHAPE, TP2]


@pytest.fixture(scope="module")
def jobs(data):
    """Run sft, reward and ppo; the first two at TP2, the last on one rank."""
    sft, reward = data / "sft", data / "reward"
    run("sft", data, sft, *sft_of(data), ranks=2)
    begin, train = f"model.init={sft}", f"data.train_path={data / 'pairs.jsonl'}"
    small = ("reward_model.batch_size=8", "reward_model.lr=1e-2")
    run("reward", data, reward, begin, train, *small, TP2, ranks=2)
    run("ppo", data, data / "ppo", *ppo_of(data))
    return data


def ppo_of(data):
    return [
        *(f"model.init={data / 'sft'}", f"reward.source={data / 'reward'}"),
        *(f"data.train_path={data / 'prompts.jsonl'}", "policy.lr=1e-2", "critic.lr=1e-2"),
        *(f"data.validation_path={data / 'held_out.jsonl'}", "rollout.batch_size=8"),
        *("rollout.max_response_tokens=12", "ppo.minibatch_size=8", "ppo.microbatch_size=4"),
        *("checkpoint.interval=1", "checkpoint.keep=5"),
    ]


def test_the_first_policy_is_the_reference_to_the_bit_and_learns(jobs):
    found = numbers(jobs / "ppo")
    assert found[0]["eval/kl"] == 0
    assert found[1]["policy/kl"] == 0
    assert found[-1]["eval/kl"] != 0
    assert found[1]["policy/grad_norm"] > 0
    assert found[1]["critic/grad_norm"] > 0


def test_passes_that_train_drop_inputs(jobs, tmp_path):
    """New adapters change no output, but what they learn is from what was not dropped."""
    for job, options, ranks in (("sft", sft_of(jobs), 2), ("ppo", ppo_of(jobs), 1)):
        run(job, jobs, tmp_path / job, *options, "run.steps=1", DROPS_NOTHING, ranks=ranks)
        without, those = (
            next(line for line in numbers(folder / job) if "policy/grad_norm" in line)
            for folder in (tmp_path, jobs)
        )
        loss = "sft/loss" if job == "sft" else "rollout/score_mean"
        assert those[loss] == pytest.approx(without[loss], rel=1e-5)
        assert those["policy/grad_norm"] != pytest.approx(without["policy/grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "ranks"),
    [((TP2, ONE), 2), ((TP2, ONE, "rollout.ranks=1"), 3)],
    ids=["own", "apart"],
)
def test_rollouts_at_another_layout_or_on_other_ranks_change_no_number(
    jobs, tmp_path, options, ranks
):
    run("ppo", jobs, tmp_path, *ppo_of(jobs), *options, ranks=ranks)
    found = numbers(tmp_path)
    for line in found:
        line.pop("rollout/staleness", None)
    close(found, numbers(jobs / "ppo"))
    moved = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # A rank's share of the adapters travels: those of 4 of them are a few kilobytes.
    assert 0 < moved[-1]["rollout/reshard_gib"] * 2**30 < 30_000


def test_checkpoints_hold_what_learns(jobs):
    for name, roles in {
        "sft": ["policy"],
        "reward": ["reward"],
        "ppo": ["policy", "critic"],
    }.items():
        (*_, folder) = sorted((jobs / name / "checkpoints").glob("step_*"))
        for role in roles:
            names = {n.removeprefix("optimizer.state.") for n in read_tensors(folder / role)}
            heads = {n for n in names if ".lora." not in n}
            assert all("output_layer.weight" in n for n in heads)
            assert bool(heads) == (role != "policy")


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(jobs, tmp_path):
    copy = tmp_path / "ppo"
    begin_again(jobs / "ppo", copy)
    run("ppo", jobs, copy, *ppo_of(jobs))
    assert numbers(copy) == numbers(jobs / "ppo")
    for export in ("hf", "hf_critic", "hf_peft", "hf_critic_peft"):
        (name,) = (path.name for path in (copy / export).glob("*.safetensors"))
        one, other = (load_file(root / export / name) for root in (copy, jobs / "ppo"))
        assert all(one[key].equal(tensor) for key, tensor in other.items())


def test_a_run_is_evaluated_with_its_adapters_merged(jobs, tmp_path):
    sources = [o for o in ppo_of(jobs) if not o.startswith(("model.init", "checkpoint", "data.tr"))]
    run("evaluate", jobs, tmp_path, f"model.init={jobs / 'ppo'}", *sources)
    found, last = numbers(tmp_path)[-1], numbers(jobs / "ppo")[-1]
    assert found["eval/score_mean"] == pytest.approx(last["eval/score_mean"], rel=1e-4)


def test_the_other_jobs_learn_adapters_too(jobs, tmp_path):
    rows = [row | {"reward": float(i % 3)} for i, row in enumerate(toy.generate_sft(0, 32))]
    write_jsonl(tmp_path / "offline.jsonl", rows)
    begin = [f"model.init={jobs / 'sft'}", "policy.lr=1e-2"]
    more = [f"data.train_path={jobs / 'pairs.jsonl'}", "preference.batch_size=8"]
    run("preference", jobs, tmp_path / "preference", *begin, *more)
    # The reference is what the adapters begin from: every margin is 0, and the loss is log 2.
    assert numbers(tmp_path / "preference")[0]["preference/loss"] == pytest.approx(0.693147, 1e-5)
    more = [f"data.train_path={tmp_path / 'offline.jsonl'}", "offline.batch_size=8"]
    more += [f"data.validation_path={jobs / 'held_out.jsonl'}", "rollout.max_response_tokens=12"]
    more += [f"reward.source={jobs / 'reward'}"]
    run("offline", jobs, tmp_path / "offline", *begin, *more)
    for job in ("preference", "offline"):
        found = read_tensors(tmp_path / job / "checkpoints" / "step_000003" / "policy")
        assert all(".lora." in name for name in found)
        assert (tmp_path / job / "hf_peft" / "adapter_model.safetensors").is_file()


SHARED = ("critic.share_base=true", "reward.share_base=true")
TP2_PP2 = (TP2, "parallel.pipeline_size=2", "memory.offload_idle=true")


@pytest.fixture(scope="module")
def shared(jobs):
    """One base for policy, reference, critic and reward model, on one rank."""
    run("ppo", jobs, jobs / "shared", *ppo_of(jobs), *SHARED)
    return jobs / "shared"


def test_models_on_one_base_judge_as_those_that_are_merged_into_bases_of_their_own(jobs, shared):
    (start, first, *_), (same_start, same_first, *_) = map(numbers, (shared, jobs / "ppo"))
    close([start], [same_start])
    # Returns are made of the values before the update, in which adapters that learned drop inputs.
    names = ["critic/return_mean", "rollout/score_mean", "rollout/score_std"]
    close([{n: first[n] for n in names}], [{n: same_first[n] for n in names}])
    state = json.loads((shared / "checkpoints" / "step_000003" / "state.json").read_text())
    digests = [state["roles"][role]["base_digest"] for role in ("policy", "critic")]
    assert digests[0].startswith(f"{digests[1]}-")


def test_a_critic_on_the_policys_base_is_that_on_a_copy_bit_for_bit(jobs, tmp_path):
    begin = [*ppo_of(jobs), "critic.init=policy", "run.steps=1", "ppo.epochs=2"]
    found = []
    for name in ("true", "false"):
        run("ppo", jobs, tmp_path / name, *begin, f"critic.share_base={name}")
        learned = load_file(tmp_path / name / "hf_critic_peft" / "adapter_model.safetensors")
        found.append((numbers(tmp_path / name), {key: t.tolist() for key, t in learned.items()}))
    assert found[0] == found[1]


def test_one_base_at_another_layout_goes_on_from_a_checkpoint(jobs, shared, tmp_path):
    copy = tmp_path / "shared"
    begin_again(shared, copy)
    run("ppo", jobs, copy, *ppo_of(jobs), *SHARED, *TP2_PP2, ranks=4)
    close(numbers(copy), numbers(shared))


def begin_again(source, copy):
    """Copy a run as it was after its first checkpoint."""
    shutil.copytree(source, copy)
    for step in (2, 3):
        shutil.rmtree(copy / "checkpoints" / f"step_00000{step}")
    (copy / "checkpoints" / "latest").write_text("step_000001")
    (copy / "complete.json").unlink()


def test_each_model_on_one_base_is_exported_by_itself(jobs, shared):
    base = load_file(jobs / "sft" / "hf" / "model.safetensors")
    for name in ("hf", "hf_critic"):
        learned = load_file(shared / f"{name}_peft" / "adapter_model.safetensors")
        merged = load_file(shared / name / "model.safetensors")
        own = {"hf": "lm_head.weight", "hf_critic": "score.weight"}[name]
        assert merged.keys() == (base.keys() - {"lm_head.weight"}) | {own}
        for key, found in merged.items():
            expected = learned[f"base_model.model.{key}"] if key == "score.weight" else base[key]
            a, b = (f"base_model.model.{key[:-7]}.lora_{side}.weight" for side in "AB")
            if a in learned:
                change = 2 * learned[b] @ learned[a]
                assert change.any()
                expected = expected + change
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_weights_that_have_changed_under_a_reward_model_are_refused(jobs, tmp_path):
    reward = tmp_path / "reward"
    shutil.copytree(jobs / "reward", reward)
    state = reward / "checkpoints" / "step_000003" / "state.json"
    text = re.sub(
        '"base_digest": "[0-9a-f]+"', '"base_digest": "0123456789abcdef"', state.read_text()
    )
    state.write_text(text)
    table = state.with_name(manifest.FILE)
    files = json.loads(table.read_text())["files"] | {manifest.STATE: manifest.facts(state)}
    table.write_text(manifest.make(files, format=1, step=3))
    options = [*ppo_of(jobs), *SHARED, f"reward.source={reward}"]
    done = run("ppo", jobs, tmp_path / "ppo", *options, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "0123456789abcdef" in line]
    assert line.startswith(
        f"{reward}/checkpoints/step_000003/reward: must be of the weights of this model; it has "
        "adapters of a base with hash 0123456789abcdef"
    )


@pytest.fixture
def tool(monkeypatch, capfd):
    """tools/convert_hf.py: arguments to exit code and what it writes."""

    def call(*arguments):
        path = str(ROOT / "tools" / "convert_hf.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        code = runpy.run_path(path)["main"]()
        done = capfd.readouterr()
        return code, done.out + done.err

    return call


def test_merging_the_exported_adapters_gives_the_exported_model(jobs, tmp_path, tool):
    base, adapters, target = jobs / "sft" / "hf", jobs / "ppo" / "hf_peft", tmp_path / "merged"
    code, said = tool("merge", base, adapters, target, "--tensor-size", "2")
    assert code == 0, said
    one, other = (load_file(f / "model.safetensors") for f in (target, jobs / "ppo" / "hf"))
    assert all(one[key].equal(tensor) for key, tensor in other.items())
    code, said = tool("export", jobs / "ppo", tmp_path / "export")
    assert code == 0, said
    one = load_file(tmp_path / "export" / "model.safetensors")
    assert all(torch.equal(one[key], tensor) for key, tensor in other.items())
    code, said = tool("merge", base, jobs / "tok", tmp_path / "none")
    assert code == 2
    assert said.startswith(f"adapters={jobs / 'tok'}: must be a folder of peft; ")


def test_training_goes_on_from_a_folder_of_peft(jobs, tmp_path):
    base, adapters = jobs / "sft" / "hf", jobs / "ppo" / "hf_peft"
    options = [f"model.hf_path={base}", f"data.train_path={jobs / 'sft.jsonl'}", "run.steps=1"]
    options += [f"model.lora.path={adapters}", "policy.lr=1e-9", "sft.batch_size=8"]
    run("sft", jobs, tmp_path / "on", *options)
    one, other = (
        load_file(f / "adapter_model.safetensors") for f in (tmp_path / "on" / "hf_peft", adapters)
    )
    assert all(torch.allclose(one[key], tensor, atol=1e-7) for key, tensor in other.items())
    # The adapters of another base, and a job that begins with a whole model.
    options[0] = f"model.hf_path={jobs / 'ppo' / 'hf'}"
    done = run("sft", jobs, tmp_path / "base", *options, check=False)
    assert done.returncode == 2
    assert "must belong to the weights of this model, hash " in done.stderr
    assert not (tmp_path / "base" / "config.yaml").exists()
    done = run("ppo", jobs, tmp_path / "ppo", *ppo_of(jobs), options[3], check=False)
    assert done.returncode == 2
    assert f"model.lora.path={adapters}: ppo begins with a whole model." in done.stderr
