"""The commands on real gloo ranks, with tiny models; the quickstart as a user starts it."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marlhf_mega.checkpoint import manifest
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.metrics.glossary import lookup
from tests.distributed.ranks import JOB, run_forked
from tests.terminal import run_in_terminal, screen

ARCHITECTURE_METRICS = """
rollout/score_mean rollout/score_std rollout/response_tokens rollout/truncated_fraction
rollout/tokens_per_second policy/loss policy/kl policy/entropy policy/clip_fraction
policy/grad_norm policy/lr critic/loss critic/explained_variance critic/clip_fraction
critic/grad_norm macro/actions_per_response macro/tokens_per_action time/step_seconds
time/rollout_seconds time/experience_seconds time/update_seconds perf/tokens_per_second
perf/tflops_rollout perf/tflops_policy perf/tflops_critic perf/tokens_per_second_experience
perf/tokens_per_second_policy perf/tokens_per_second_critic
perf/peak_memory_gib perf/rollout_peak_memory_gib perf/experience_peak_memory_gib
perf/update_peak_memory_gib eval/score_mean eval/gold_mean eval/win_rate
""".split()
TINY = [
    "model.num_layers=4",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "sft.batch_size=8",
    "reward_model.batch_size=8",
    "rollout.batch_size=8",
    "ppo.minibatch_size=4",
    "ppo.microbatch_size=2",
    "evaluate.num_prompts=8",
]


def marlhf(*arguments, ranks=1, check=True):
    done = run_forked(JOB, *arguments, ranks=ranks)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def in_terminal(*arguments, columns, ranks=1):
    """Run a command in a terminal of this width.

    Returns:
        What the terminal shows in the end, and all states of the line at the bottom.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    code, written = run_in_terminal(
        [*command, "-m", "marlhf_mega", *map(str, arguments)],
        columns=columns,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    shown = screen(written, columns)
    assert code == 0, "\n".join(shown[-60:])
    bars = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", part) for part in re.split(r"[\r\n]", written)]
    return shown, [bar for bar in bars if bar.endswith(" left")]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def numbers(run_dir):
    """Every metric that is not a time, by step."""
    return [
        {k: v for k, v in line.items() if not re.match("time/|perf/|.*_per_second", k)}
        for line in lines(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Run the quickstart for four steps a job on TP2 x PP2, with checkpoints on the way."""
    folder = tmp_path_factory.mktemp("quickstart")
    options = [f"run.dir={folder}", "run.steps=4", "checkpoint.interval=2", "checkpoint.keep=2"]
    options += ["precision.fp8_check_interval=2", "evaluate.interval=2"]
    return folder, in_terminal("quickstart", *options, *TINY, columns=80, ranks=4)


def test_the_quickstart_ends_with_a_table_and_a_report(quickstart):
    folder, (shown, _) = quickstart
    at_the_end = "\n".join(shown[-10:])
    for row in ("gold reward", "reward model score", "KL from the reference", "response length"):
        assert row in at_the_end
    # 80 columns are too few for the path.
    assert f"report: {folder / 'report.html'}" in "".join(shown[-4:])
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!#)|url\(|<script""", page)


def test_a_narrow_terminal_shows_steps_as_history_and_a_whole_bar(quickstart):
    """No line of the log is glued to the bar, which is there at every moment."""
    shown, bars = quickstart[1]
    for job in ("sft", "reward", "ppo"):
        own = [bar for bar in bars if bar.startswith(job)]
        done = {int(re.match(rf"{job} +(\d)/4 ", bar)[1]) for bar in own}
        assert done == {0, 1, 2, 3, 4}
        for bar in own:
            assert len(bar) <= 80
            assert re.search(r" (start-up|\w+) +(\d+:\d\d:\d\d|-:--:--) left$", bar), bar
        assert any(re.search(r"\d left$", bar) for bar in own)
    heading = next(line for line in shown if "actions" in line)
    assert heading.split() == [
        *("step", "score", "KL", "length", "actions", "tok/act", "clip", "%", "explain", "s/step"),
        "entropy",
    ]
    steps = [line.split()[0] for line in shown if re.match(r" +\d/4 ", line)]
    assert steps == ["1/4", "2/4", "4/4"] * 2 + ["1/4", "2/4", "3/4", "4/4"]
    assert all(re.match("[0-9:]{8} I ", line) for line in shown if "wrote the checkpoint" in line)


def test_every_evaluation_is_on_the_screen_with_its_error_and_change(quickstart):
    """As the numbers of metrics.jsonl are."""
    folder, (shown, _) = quickstart
    for job, names in {
        "sft": {"eval/loss": "held-out loss (nats)", "eval/perplexity": "perplexity"},
        "reward": {"eval/accuracy": "accuracy (%)", "eval/margin": "margin"},
        "ppo": {"eval/score_mean": "reward model score", "eval/kl": "KL from the reference (nats)"},
    }.items():
        recorded = lines(folder / job / "metrics.jsonl")
        assert [line["step"] for line in recorded] == [0, 1, 2, 3, 4]
        for name, title in names.items():
            assert [line["step"] for line in recorded if name in line] == [0, 2, 4]
            error = name.removesuffix("_mean") + "_stderr"
            change = name.removesuffix("_mean") + "_change"
            assert recorded[4][change] == pytest.approx(recorded[4][name] - recorded[0][name])
            metric = lookup(name)
            for line in (recorded[0], recorded[2], recorded[4]):
                row = (
                    re.escape(title)
                    + " *"
                    + re.escape(metric.with_error(line[name], line.get(error)))
                )
                assert any(re.search(row, text) for text in shown), row
            grown = metric.with_error(recorded[4][change], recorded[4][f"{change}_stderr"])
            assert any(title in text and text.endswith(grown) for text in shown), grown


def test_a_finished_job_says_so_at_once(quickstart):
    folder = quickstart[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    options = [f"run.dir={folder}", "run.steps=4", "checkpoint.interval=2", "checkpoint.keep=2"]
    options += ["precision.fp8_check_interval=2", "evaluate.interval=2"]
    done = marlhf("quickstart", *options, *TINY, ranks=4)
    assert f"already complete: {folder} has the results of exactly these settings" in done.stderr
    assert f"\n  {folder / 'ppo' / 'hf'}\n" in done.stderr
    assert "held-out" not in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_ppo_run_writes_the_metrics_of_the_contract(quickstart):
    found = lines(quickstart[0] / "ppo" / "metrics.jsonl")
    assert [line["step"] for line in found] == [0, 1, 2, 3, 4]
    assert set(ARCHITECTURE_METRICS) <= set(found[-1])
    # The last line has what came after its step, too.
    assert found[-1]["time/checkpoint_seconds"] > 0
    assert found[-1]["time/export_seconds"] > 0
    assert all(math.isfinite(v) for line in found for v in line.values())


def test_the_first_ratio_is_one(quickstart):
    """Sampler and trainer agree on every token's probability, at every step."""
    found = lines(quickstart[0] / "ppo" / "metrics.jsonl")
    assert all(line["rollout/logprob_gap_max"] < 1e-4 for line in found[1:])


def test_without_fp8_a_comparison_with_it_finds_nothing(quickstart):
    first, second = lines(quickstart[0] / "ppo" / "metrics.jsonl")[1:3]
    assert first["policy/fp8_logprob_gap"] == first["policy/fp8_logprob_gap_max"] == 0
    assert first["policy/fp8_gradient_cosine"] == pytest.approx(1)
    assert "policy/fp8_gradient_cosine" not in second


def test_samples_show_macro_actions(quickstart):
    samples = lines(quickstart[0] / "ppo" / "samples.jsonl")
    assert samples
    for sample in samples:
        actions = sample["actions"]
        assert [a["start"] for a in actions] == list(range(0, len(sample["tokens"]), 5))
        assert sum(a["length"] for a in actions) == len(sample["tokens"])
        assert sum(a["kl"] for a in actions) == pytest.approx(sample["kl"], abs=1e-5)
        assert sample["end"] == "</s>" or len(sample["tokens"]) == 56
        assert "".join(sample["tokens"]) == sample["response"]


def test_statistics_of_macro_actions_are_of_all_responses(quickstart):
    """With one replica, of the whole batch: means over positions are those over actions."""
    found = lines(quickstart[0] / "ppo" / "macro_actions.jsonl")
    assert [line["step"] for line in found] == [1]
    metrics = lines(quickstart[0] / "ppo" / "metrics.jsonl")[1]
    counts = found[0]["lengths"]
    total = sum(counts.values())
    assert total == sum(position["count"] for position in found[0]["positions"])
    tokens = sum(int(length) * count for length, count in counts.items())
    assert tokens / total == pytest.approx(metrics["macro/tokens_per_action"])
    divergence = sum(p["kl"] * p["count"] for p in found[0]["positions"])
    assert divergence / 8 == pytest.approx(metrics["policy/kl"], abs=1e-4)


def test_the_run_directory_is_whole(quickstart):
    ppo = quickstart[0] / "ppo"
    config = (ppo / "config.yaml").read_text()
    assert "4 ranks: TP2 x PP2 x DP1 (gloo, cpu)" in config
    assert "megatron-core" in config
    assert (ppo / "checkpoints" / "latest").read_text() == "step_000004\n"
    assert sorted(p.name for p in (ppo / "checkpoints").glob("step_*")) == [
        "step_000002",
        "step_000004",
    ]
    assert list((ppo / "tensorboard").iterdir())
    assert "LlamaForSequenceClassification" in (ppo / "hf_critic" / "config.json").read_text()


def test_the_exported_policy_answers_alike_in_transformers(quickstart, tmp_path):
    """Greedy answers by our cache and by transformers, in a clean process."""
    folder = quickstart[0]
    out = tmp_path / "eval"
    marlhf(
        "evaluate",
        f"model.init={folder / 'ppo'}",
        f"data.validation_path={folder / 'data' / 'prompts_held_out.jsonl'}",
        "evaluate.num_prompts=4",
        "evaluate.temperature=0",
        "rollout.max_response_tokens=12",
        "data.max_prompt_tokens=48",
        f"run.dir={out}",
    )
    ours = {s["prompt"]: s["response"] for s in lines(out / "samples.jsonl")}
    program = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
answers = {}
for prompt in json.load(sys.stdin):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    new = model.generate(ids, do_sample=False, max_new_tokens=12)
    answers[prompt] = new[0, ids.shape[1]:].tolist()
print(json.dumps(answers))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder / "ppo" / "hf")],
        input=json.dumps(list(ours)),
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizer = Tokenizer.load(folder / "data" / "tokenizer")
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert {prompt: tokenizer.decode(ids) for prompt, ids in theirs.items()} == ours


def test_two_policies_are_compared_alike_at_any_layout(quickstart, tmp_path):
    folder = quickstart[0]
    options = [
        f"model.init={folder / 'ppo'}",
        *("--against", folder / "sft"),
        f"reward.source={folder / 'reward'}",
        "evaluate.gold=marlhf_mega.data.toy:gold_reward",
        f"data.validation_path={folder / 'data' / 'prompts_held_out.jsonl'}",
        "evaluate.num_prompts=10",
        "rollout.max_response_tokens=24",
        "data.max_prompt_tokens=40",
    ]
    for ranks, layout in ((1, []), (4, ["parallel.tensor_size=2"])):
        marlhf("evaluate", *options, f"run.dir={tmp_path / str(ranks)}", *layout, ranks=ranks)
    one, four = (json.loads((tmp_path / n / "evaluation.json").read_text()) for n in "14")
    assert four == pytest.approx(one, rel=1e-4, abs=1e-5)
    assert one["eval/win_rate_over_other_ties"] < 1
    assert {"eval/gold_win_rate_over_other_low", "other/score_mean", "eval/score_change"} <= {*one}


def stage_options(folder, job):
    """Return options that make `marlhf JOB` the job that the quickstart ran, by its own file."""
    file = {"sft": "sft", "reward": "preferences", "ppo": "prompts"}[job]
    return [
        "--config",
        str(folder / job / "config.yaml"),
        f"data.train_path={folder / 'data' / file}.jsonl",
    ]


@pytest.mark.parametrize("job", ["sft", "reward", "ppo"])
def test_a_resumed_run_equals_the_uninterrupted_one(quickstart, tmp_path, job):
    """From the checkpoint after two of four steps, on the same layout, bit for bit.

    Its checkpoints are written while it goes on, and what ppo does not need goes to the host
    between phases; neither was so in the uninterrupted run.
    """
    folder = quickstart[0]
    options = stage_options(folder, job)
    resumed = tmp_path / job
    shutil.copytree(folder / job, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000004")
    (resumed / "checkpoints" / "latest").write_text("step_000002\n")
    if job == "ppo":
        options += ["memory.offload_idle=true", "memory.offload_optimizer=true"]
    background = ["checkpoint.async_save=true", "checkpoint.interval=1"]
    options += [f"run.dir={resumed}", *background]
    if job != "ppo":
        marlhf(job, *options, ranks=4)
    else:
        shown, bars = in_terminal(job, *options, columns=120, ranks=4)
        assert "since the start" in "\n".join(shown)
        assert {len(bar) for bar in bars} <= {*range(100, 121)}
        heading = next(line for line in shown if "actions" in line)
        assert heading.split()[-5:] == ["cut", "%", "grad", "lr", "tok/s"]
    assert numbers(resumed) == numbers(folder / job)
    assert "time/checkpoint_seconds" in lines(resumed / "metrics.jsonl")[-1]
    assert ("time/offload_seconds" in lines(resumed / "metrics.jsonl")[-1]) == (job == "ppo")
    weights = [
        {
            name: facts
            for name, facts in manifest.read(run / "checkpoints" / "step_000004")["files"].items()
            if name.endswith(".distcp")
        }
        for run in (resumed, folder / job)
    ]
    assert weights[0] == weights[1] != {}
    if job == "reward":  # once more, it is complete: the data is not read
        data = folder / "data" / "preferences.jsonl"
        data.rename(data.with_suffix(".gone"))
        done = marlhf(job, *options, ranks=4)
        data.with_suffix(".gone").rename(data)
        assert done.stdout.startswith(f"already complete: {resumed} has the results of exactly")
        assert done.stdout.count("already complete") == 1


def test_a_run_resumes_on_another_layout_with_yet_another_for_rollouts(quickstart, tmp_path):
    """TP2 x PP2 becomes PP2 x VPP2 x DP2 with overlap, four replicas for rollouts, packed."""
    folder = quickstart[0]
    options = stage_options(folder, "ppo")
    resumed = tmp_path / "ppo"
    shutil.copytree(folder / "ppo", resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000004")
    marlhf(
        "ppo",
        *options,
        f"run.dir={resumed}",
        "parallel.tensor_size=1",
        "parallel.pipeline_size=2",
        "parallel.virtual_pipeline_size=2",
        "parallel.overlap=true",
        "rollout.pipeline_size=1",
        "ppo.microbatch_tokens=150",
        "ppo.packing=true",
        ranks=4,
    )
    assert "time/reshard_seconds" in lines(resumed / "metrics.jsonl")[-1]
    for found, expected in zip(numbers(resumed), numbers(folder / "ppo"), strict=True):
        assert found.pop("rollout/reshard_gib", 1) > 0
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(quickstart, tmp_path):
    folder = quickstart[0]
    options = stage_options(folder, "sft")
    resumed = tmp_path / "sft"
    shutil.copytree(folder / "sft", resumed)
    victim = max((resumed / "checkpoints" / "step_000004" / "policy").glob("*.distcp"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    (resumed / "checkpoints" / "latest").write_text("garbage")
    done = marlhf("sft", *options, f"run.dir={resumed}", ranks=4)
    warnings = [line for line in done.stderr.splitlines() if "is damaged" in line]
    assert len(warnings) == 1
    assert f"policy/{victim.name} has changed" in warnings[0]
    assert warnings[0].endswith("using step_000002")
    assert numbers(resumed) == numbers(folder / "sft")


def test_a_changed_setting_or_data_file_is_refused_with_both_values(quickstart, tmp_path):
    folder = quickstart[0]
    options = stage_options(folder, "sft")
    resumed = tmp_path / "sft"
    shutil.copytree(folder / "sft", resumed)
    layout = ["parallel.tensor_size=1", "parallel.pipeline_size=1", f"run.dir={resumed}"]
    done = marlhf("sft", *options, *layout, "sft.batch_size=4", check=False)
    assert done.returncode == 2
    assert "sft.batch_size=4: must be as in the checkpoint, 8" in done.stderr
    data = tmp_path / "sft.jsonl"
    rows = (folder / "data" / "sft.jsonl").read_text().splitlines()
    data.write_text("\n".join(rows[::-1]))
    done = marlhf("sft", *options, *layout, f"data.train_path={data}", check=False)
    assert done.returncode == 2
    assert re.search(
        r"must hold the rows of the checkpoint, sha256 [0-9a-f]{64}; it is [0-9a-f]{64}\.",
        done.stderr,
    )


def test_a_check_refuses_what_a_start_would_refuse_of_a_checkpoint(quickstart):
    """With one process, for as many ranks as wrote it; nothing is written."""
    folder = quickstart[0]
    options = [*stage_options(folder, "ppo"), f"run.dir={folder / 'ppo'}"]
    check = ["--check", "--world-size", "4", "checkpoint.resume=must"]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert marlhf("ppo", *options, *check).returncode == 0
    done = marlhf("ppo", *options, *check, "macro.n=3", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("macro.n=3: must be as in the checkpoint, 5. Set it back")
    assert done.stderr.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_best_of_several_evaluations_is_kept_and_exported_from_many_ranks(quickstart, tmp_path):
    """As a run of the same settings exports that ends there."""
    options = [*stage_options(quickstart[0], "sft"), "policy.lr=0.5", "policy.lr_schedule=constant"]
    best = ["checkpoint.keep_best=eval/loss", "checkpoint.keep=1", "checkpoint.interval=0"]
    folder = tmp_path / "best"
    marlhf("sft", *options, *best, "evaluate.interval=1", f"run.dir={folder}", ranks=4)
    losses = {x["step"]: x["eval/loss"] for x in lines(folder / "metrics.jsonl") if x["step"]}
    step = min(losses, key=losses.get)
    assert 1 <= step < 4, losses
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert kept == [f"step_{number:06d}" for number in (step, 4)]
    shorter = tmp_path / "shorter"
    marlhf("sft", *options, f"run.steps={step}", f"run.dir={shorter}", ranks=4)
    exports = [(run / "hf" / "model.safetensors").read_bytes() for run in (folder, shorter)]
    assert exports[0] == exports[1]


def test_a_resume_that_must_be_is_refused_without_a_checkpoint(quickstart, tmp_path):
    options = stage_options(quickstart[0], "sft")
    layout = ["parallel.tensor_size=1", "parallel.pipeline_size=1"]
    must = [f"run.dir={tmp_path}", "checkpoint.resume=must"]
    done = marlhf("sft", *options, *layout, *must, check=False)
    assert done.returncode == 2
    assert f"checkpoint.resume=must: {tmp_path} has no checkpoint that can be loaded" in done.stderr
