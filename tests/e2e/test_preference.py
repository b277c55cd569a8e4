"""`marlhf preference` on real gloo ranks and in this process, with tiny models."""

import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from marlhf_mega.config.load import ConfigError, load_config
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.models.forward import logprob_forward, make_batches, run_forward
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.train.build import build_model
from marlhf_mega.train.generation import build_evaluator
from marlhf_mega.train.online_pairs import Answering
from marlhf_mega.train.origins import policy_origin
from marlhf_mega.train.preference import run_preference
from marlhf_mega.train.preference_inputs import preference_inputs
from tests.distributed.ranks import JOB, run_forked
from tests.e2e.reported import assert_reported

SETTINGS = {
    "model": {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "init_std": 0.2},
    "data": {"max_prompt_tokens": 64, "max_response_tokens": 48},
    "policy": {"lr": 1e-3},
    "sft": {"batch_size": 8, "microbatch_size": 4},
    "preference": {"batch_size": 8, "microbatch_size": 2},
    "evaluate": {"interval": 2},
    "checkpoint": {"interval": 2},
    "logging": {"tensorboard": False},
}
# What each loss needs besides its name.
LOSSES = {
    "dpo": {"label_smoothing": 0.1, "nll_coef": 0.1, "margin": "offset"},
    "ipo": {"length_normalize": True, "margin": "weight"},
    "pro": {"num_responses": 3, "nll_coef": 0.05},
    "cpl": {"gamma": 0.9, "nll_coef": 0.1},
    "xpo": {"xpo_alpha": 0.01},
    "refuel": {},
    "bfpo": {"beta": 0.01},
}
# Of the policy's own answers, judged in every step.
ONLINE = {"nash_md": {"mixture": 0.5}, "ipo_md": {"mixture": 0.0}}

ORACLE = """
import json, sys, torch, transformers
pairs, found = json.loads(sys.stdin.read()), []
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found.append([])
    for prompt, *responses in pairs:
        sums = []
        for response in responses:
            with torch.no_grad():
                table = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1).double()
            places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            sums.append(sum(table[p, t].item() for p, t in zip(places, response)))
        found[-1].append(sums)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hold 40 pairs with margins, 13 held-out ones, and a model to start from."""
    folder = tmp_path_factory.mktemp("preference")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    for seed, count, name in ((0, 40, "pairs"), (1, 13, "held_out")):
        rows = enumerate(toy.generate_preferences(seed, count))
        write_jsonl(folder / f"{name}.jsonl", [row | labels(i, row) for i, row in rows])
    write_jsonl(folder / "sft.jsonl", toy.generate_sft(0, 8))
    settings = SETTINGS | {"tokenizer": {"path": str(folder / "tok")}}
    (folder / "job.yaml").write_text(yaml.safe_dump(settings))
    marlhf(folder, "sft", "start", f"data.train_path={folder}/sft.jsonl", "run.steps=1")
    return folder


def labels(number, row):
    """What some losses read of a row."""
    safe = {"chosen_safe": number % 3 > 0, "rejected_safe": number % 2 > 0}
    return {
        "margin": 0.1 * (number % 3),
        "responses": ["sun", row["rejected"], row["chosen"]],
        "rewards": [0.0, 0.5, 1.5],
        "from_reference": ["chosen", "rejected"][number % 2],
    } | safe


def marlhf(folder, job, name, *options, ranks=1):
    out = [f"run.dir={folder / name}", "--config", folder / "job.yaml"]
    done = run_forked(JOB, job, *out, *options, ranks=ranks)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stderr


def options(folder):
    return [
        f"data.train_path={folder}/pairs.jsonl",
        f"data.validation_path={folder}/held_out.jsonl",
        f"model.hf_path={folder}/start/hf",
    ]


def preference(folder, name, *more, ranks=1):
    said = marlhf(folder, "preference", name, *options(folder), "run.steps=4", *more, ranks=ranks)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return said, [
        {k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "perf/"))}
        for line in lines
    ]


@pytest.fixture(scope="module")
def trained(folder):
    return preference(folder, "one")


def test_it_starts_without_a_preference(trained):
    start, *steps = trained[1]
    assert start["eval/margin"] == pytest.approx(0, abs=1e-5)
    assert start["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert {"eval/accuracy", "eval/accuracy_stderr", "eval/margin_stderr"} <= start.keys()
    assert steps[0]["preference/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[-1]["preference/margin"] != 0


def test_held_out_results_are_those_of_the_exported_models_in_transformers(folder, trained):
    config = load_config(folder / "job.yaml", options(folder))
    pairs = [
        (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        for pair in preference_inputs(config, 1).validation
    ]
    done = subprocess.run(
        [sys.executable, "-c", ORACLE, str(folder / "start" / "hf"), str(folder / "one" / "hf")],
        input=json.dumps(pairs),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    leads = [
        0.1 * ((chosen - rejected) - (chosen_0 - rejected_0))
        for (chosen, rejected), (chosen_0, rejected_0) in zip(after, before, strict=True)
    ]
    found = trained[1][-1]
    assert found["eval/margin"] == pytest.approx(sum(leads) / 13, abs=1e-5)
    assert found["eval/accuracy"] == pytest.approx(sum(lead > 0 for lead in leads) / 13)
    losses = [math.log1p(math.exp(-lead)) for lead in leads]
    assert found["eval/loss"] == pytest.approx(sum(losses) / 13, abs=1e-5)


def test_a_resumed_run_equals_the_uninterrupted_one_and_reads_the_reference(folder, trained):
    shutil.copytree(folder / "one", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "step_000004")
    said, again = preference(folder, "resumed")
    assert again == trained[1]
    assert "reference: log-probs of 40 pairs are in" in said


def test_eight_ranks_give_the_numbers_of_one(folder, trained):
    wide = ["parallel.tensor_size=2", "parallel.pipeline_size=2", "preference.packing=true"]
    _, found = preference(folder, "eight", *wide, ranks=8)
    for ours, expected in zip(found, trained[1], strict=True):
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=2e-5), name


@pytest.fixture(scope="module")
def mesh(folder):
    config = load_config(folder / "job.yaml", [])
    joined = create_mesh(config.parallel)
    yield joined
    destroy_mesh(leave_world=False)
    dist.destroy_process_group()


def in_process(folder, mesh, run_dir, keys, *more):
    given = [f"preference.{key}={value}" for key, value in keys.items()]
    quick = ["run.steps=2", "checkpoint.export_hf=false", "checkpoint.interval=0"]
    config = load_config(
        folder / "job.yaml",
        [*options(folder), *given, *quick, *more, f"run.dir={run_dir}"],
    )
    inputs = preference_inputs(config, 1)
    with Watchdog(inputs.config, mesh) as watchdog:
        run_preference(inputs, mesh, watchdog)
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_runs_share_log_probs_of_one_reference_and_not_of_another(
    folder, trained, mesh, tmp_path, caplog
):
    caplog.set_level("INFO")
    shared = {"reference_dir": folder / "one" / "reference"}
    in_process(folder, mesh, tmp_path / "sharp", shared | {"beta": 0.5})
    assert "log-probs of 40 pairs are in" in caplog.text
    assert "of 40 pairs\n" not in caplog.text
    other = shared | {"reference": folder / "one"}
    start, *_ = in_process(folder, mesh, tmp_path / "other", other)
    assert "log-probs of 40 of 40 pairs" in caplog.text
    # The policy is where the reference started from.
    assert start["eval/margin"] == pytest.approx(-trained[1][-1]["eval/margin"], abs=1e-5)


def test_it_learns_eight_pairs_and_keeps_the_best(folder, mesh, tmp_path):
    write_jsonl(tmp_path / "few.jsonl", toy.generate_preferences(0, 8))
    few = [f"data.{name}_path={tmp_path}/few.jsonl" for name in ("train", "validation")]
    best = ["checkpoint.keep_best=eval/accuracy", "evaluate.patience=2", "run.steps=20"]
    start, *steps = in_process(folder, mesh, tmp_path / "run", {}, *few, *best)
    assert start["eval/accuracy"] == pytest.approx(0.5, abs=0.5)
    assert max(line.get("eval/accuracy", 0) for line in steps) == 1
    assert steps[-1]["eval/loss"] < 0.5
    assert len(steps) < 20  # nothing is better than all pairs
    assert "preference" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_two_steps_padded_as_packed(folder, mesh, tmp_path, loss):
    keys = {"loss": loss} | LOSSES[loss]
    padded, packed = (
        in_process(folder, mesh, tmp_path / name, keys | {"packing": name})
        for name in ("false", "true")
    )
    assert len(padded) == 3
    names = [n for n in padded[1] if n.startswith(("preference/", "policy/", "eval/"))]
    assert {"preference/loss", "preference/accuracy", "policy/grad_norm"} <= {*names}
    for line, other in zip(padded, packed, strict=True):
        for name in names:
            if name in line:
                assert math.isfinite(line[name])
                assert other[name] == pytest.approx(line[name], rel=1e-4, abs=1e-5), name
    assert padded[1]["policy/grad_norm"] > 1e-3
    assert_reported(tmp_path / "false", "preference")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["preference.loss=bfpo"],
            "preference.loss=bfpo: needs chosen_safe and rejected_safe in every row; not all rows",
        ),
        (
            ["preference.loss=pro", "data.fields={responses: texts, rewards: scores}"],
            "preference.num_responses=2: must be the number of responses in every row; ",
        ),
        (["preference.loss=xpo"], "preference.loss=xpo: needs from_reference in every row; not"),
        (
            ["preference.loss=ipo", "data.fields={chosen_probability: sure}"],
            "preference.loss=ipo: takes every label as certain; ",
        ),
        (["preference.loss=refuel"], "preference.loss=refuel: needs rows with a margin; none of "),
        (["preference.margin=weight"], "preference.margin=weight: needs rows with a margin; none"),
        (
            ["preference.margin=weight", "data.fields={margin: sign}"],
            "preference.margin=weight: needs margins of at least 0; the least of ",
        ),
        (
            ["preference.reference=/nowhere"],
            "preference.reference=/nowhere: must be a run directory or a Hugging Face folder;",
        ),
    ],
)
def test_data_and_models_that_do_not_suit_the_keys_are_refused(folder, tmp_path, keys, message):
    more = {"sign": -2, "sure": 0.9, "texts": ["a", "b", "c"], "scores": [0, 1, 2]}
    rows = [row | more for row in toy.generate_preferences(0, 8)]
    write_jsonl(tmp_path / "bare.jsonl", rows)
    given = [*options(folder), f"data.train_path={tmp_path}/bare.jsonl", *keys]
    with pytest.raises((ConfigError, ValueError)) as refused:
        preference_inputs(load_config(folder / "job.yaml", given), 1)
    assert str(refused.value).startswith(message)


def judged(folder):
    """Keys of a run on prompts, its pairs judged by how many letters a response has."""
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 24))
    (folder / "letters.py").write_text(
        "def reward(prompt, response):\n    return sum(map(str.isalpha, response)) / 10\n"
    )
    given = [f"data.{part}_path={folder}/prompts.jsonl" for part in ("train", "validation")]
    given += [f"reward.source={folder}/letters.py:reward", "rollout.max_response_tokens=12"]
    return [*given, "evaluate.num_prompts=4", "evaluate.batch_size=4"]


def online(folder, run_dir, mesh, loss, *more):
    """Metrics of two steps."""
    return in_process(folder, mesh, run_dir, {"loss": loss} | ONLINE[loss], *judged(folder), *more)


@pytest.mark.parametrize("name", ONLINE)
def test_the_policy_learns_from_pairs_of_its_own(folder, mesh, tmp_path, name):
    padded, packed = (
        online(folder, tmp_path / packing, mesh, name, f"preference.packing={packing}")
        for packing in ("false", "true")
    )
    assert {"eval/score_mean", "eval/kl"} <= padded[0].keys()
    for line, other in zip(padded, packed, strict=True):
        for key in (k for k in line if k.startswith(("preference/", "policy/", "eval/"))):
            assert other[key] == pytest.approx(line[key], rel=1e-4, abs=1e-5), key
    assert padded[1]["policy/grad_norm"] > 1e-3
    # The policy still is its reference: D = 0, and so is every implicit reward.
    assert padded[1]["preference/margin"] == pytest.approx(0, abs=1e-5)
    assert padded[2]["preference/margin"] != 0
    assert 0 < padded[1]["preference/win_rate"] < 1
    assert_reported(tmp_path / "false", "preference")


def test_pairs_are_drawn_and_judged_as_if_one_by_one(folder, mesh, tmp_path):
    """Each response by itself with the draws of its place; the better one comes first."""
    keys = ["preference.loss=nash_md", "preference.mixture=0.5", f"run.dir={tmp_path}/run"]
    start = f"model.hf_path={folder}/start/hf"
    config = load_config(folder / "job.yaml", [*keys, *judged(folder), start])
    inputs = preference_inputs(config, 1)
    config, tokenizer = inputs.config, inputs.tokenizer
    stop, limit = StopRule.of(tokenizer), MicrobatchLimit(sequences=4)
    policy, evaluator = build_evaluator(inputs, mesh, limit=limit, learns=True)
    reference = build_model(
        config.model, config, mesh, origin=policy_origin(config), name="reference", frozen=True
    )
    for chunk in reference:  # another model
        for parameter in chunk.parameters():
            parameter.mul_(1.5)
    second = Generator(policy, mesh, stop=stop, second=reference)
    forward = partial(logprob_forward, temperature=1.0)
    answering = Answering(config, second, evaluator.scorer, reference, forward, mesh, limit)
    prompts = inputs.train[:6]
    pairs, known = answering.pairs(prompts, 5)
    evaluator.close()
    opponents = 0
    for number, (prompt, pair) in enumerate(zip(prompts, pairs, strict=True)):
        alone = [
            second.generate(
                [prompt.prompt_ids],
                [2 * number + side],
                RolloutOptions(
                    rule=SamplingRule(temperature=1.0, mixture=0.5 * side),
                    max_response_tokens=12,
                    seed=config.run.seed,
                    step=5,
                ),
            ).responses[0]
            for side in range(2)
        ]
        scores = [
            sum(map(str.isalpha, tokenizer.response_text(response))) / 10 for response in alone
        ]
        best = int(scores[1] > scores[0])
        opponents += best
        assert [pair.chosen_ids, pair.rejected_ids] == [alone[best], alone[1 - best]]
        assert pair.from_reference == ["rejected", "chosen"][best]
        lead = abs(scores[0] - scores[1])
        assert pair.chosen_probability == pytest.approx(1 / (1 + math.exp(-lead)))
        for side, response in enumerate(pair.responses):
            batches = make_batches([prompt.prompt_ids], [response], limit=limit, mesh=mesh)
            logprobs = run_forward(reference, batches, forward, leading=(2,))[0]
            kept = known.ref_logprobs[number, side, : len(response)].tolist()
            assert kept == pytest.approx(logprobs[0].tolist(), rel=1e-5, abs=1e-5)
    assert 0 < opponents < 6
    assert torch.equal(known.ref_sums, known.ref_logprobs.sum(2))


def test_an_online_run_resumes_and_does_not_depend_on_the_layout(folder, mesh, tmp_path):
    """Two steps on four ranks, and the second of two after a resume."""
    whole = online(folder, tmp_path / "whole", mesh, "nash_md", "checkpoint.interval=1")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_000002")
    again = online(folder, tmp_path / "again", mesh, "nash_md", "checkpoint.interval=1")
    numbers = [
        [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in run]
        for run in (whole, again)
    ]
    assert numbers[0] == numbers[1]
    wide = ["parallel.pipeline_size=2", "preference.loss=nash_md", "preference.mixture=0.5"]
    given = [f"model.hf_path={folder}/start/hf", "run.steps=2", "checkpoint.export_hf=false"]
    marlhf(folder, "preference", "wide", *wide, *given, *judged(folder), ranks=4)
    lines = (folder / "wide" / "metrics.jsonl").read_text().splitlines()
    for line, expected in zip(map(json.loads, lines), numbers[0], strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4, abs=2e-5), name
