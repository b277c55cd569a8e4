"""PPO under every macro rule, estimator and objective, in one process: real loop, tiny model."""

import json
import shutil
import threading
import traceback
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import marlhf_mega
from marlhf_mega.algorithm.losses import policy_loss
from marlhf_mega.commands.evaluate import run_evaluate
from marlhf_mega.config.load import dump_config, load_config
from marlhf_mega.config.schema import Config
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.tokenizer import Tokenizer
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.experience.evaluation import prompt_row
from marlhf_mega.metrics.ppo import step_sums
from marlhf_mega.models.forward import last_token_scores, make_batches
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.rollout.types import Rollout, RolloutOptions
from marlhf_mega.train.inputs import read_inputs
from marlhf_mega.train.ppo import PpoRun, run_ppo
from marlhf_mega.update import ppo as update
from tests.e2e.reported import assert_reported

PACKAGE = Path(marlhf_mega.__file__).parent

RULES = {
    "token": {},
    "fixed_ngram": {"n": 3, "ratio": "macro", "value": "position"},
    "random_ngram": {"value": "unit", "value_target": "macro"},
    "perplexity": {"perplexity": "segment", "ratio": "macro_geo", "reward": "mean"},
    "probability": {"probability": 0.01},
    "entropy": {"entropy_share": 0.5, "ratio": "macro_geo", "value": "unit"},
    "parsing": {"eos": "own", "min_length": 2},
    "sentence": {"discount": "per_token", "lambda_unit": "per_token", "max_length": 8},
    "whole_response": {"value": "first"},
}


PAIRS = {"aggregation": "seq_mean_token_sum", "objective": "p3o", "estimator": "dr_grpo"}
# Keys of ppo, of macro, and the responses to each prompt.
METHODS = {
    "sae": ({"estimator": "sae"}, {"rule": "probability", "probability": 0.01}, 1),
    "vapo": ({"gae_lambda_alpha": 0.3, "gae_lambda_critic": 1.0, "clip_range_high": 0.28}, {}, 1),
    "rloo": ({"estimator": "rloo"}, {"rule": "whole_response", "ratio": "macro"}, 2),
    "grpo": ({"estimator": "grpo", "objective": "cispo"}, {}, 4),
    "dr_grpo": ({"estimator": "dr_grpo", "aggregation": "seq_sum_const"}, {}, 4),
    "reinforce_pp": ({"estimator": "reinforce_pp"}, {"rule": "token"}, 1),
    "reinforce_pp_baseline": ({"estimator": "reinforce_pp_baseline"}, {}, 2),
    "remax": ({"estimator": "remax", "objective": "pg"}, {}, 1),
    "vine": (
        {"estimator": "vine", "vine_samples": 2, "likely_mask": 0.01},
        {"rule": "probability", "probability": 0.01, "probability_interval": 4},
        1,
    ),
    "p3o": (PAIRS, {}, 2),
    "brain": (PAIRS | {"objective": "pg", "estimator": "brain", "kl_coef": 1.0}, {}, 4),
    "masked": ({"sampler_mask": "sequence", "tis_cap": 2.0}, {}, 1),
}


# Keys of reward, and of ppo.
REWARDS = {
    "shaped": (
        {
            "shaping": ["par", "length_penalty", "overlong", "z_score"],
            "length_coef": 0.01,
            "reference_field": "drafts",
        },
        {"estimator": "remax"},
    ),
    "robust": ({"source": [{"source": "varied:reward"}] * 2, "combine": "robust"}, {}),
    "maxmin": (
        {"source": [{"source": "varied:reward", "weight": w} for w in (1, 2)], "combine": "maxmin"},
        {"estimator": "reinforce_pp"},
    ),
    "constrained": (
        {"constraints": {"source": "varied:reward", "threshold": 3}, "clip": 5},
        {"estimator": "reinforce_pp"},
    ),
    "calibrated": (
        {
            "shaping": "center_reference",
            "reference_field": "drafts",
            "kl_max": 50.0,
            # Nobody judges the references.
            "constraints": {"source": "unlike:reward", "threshold": 1},
        },
        {},
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 32))
    rows = [
        row | {"drafts": [f"Dear {i}.", "Hello."] if i % 2 else "Dear all."}
        for i, row in enumerate(toy.generate_prompts(0, 32))
    ]
    write_jsonl(folder / "drafts.jsonl", rows)
    (folder / "shaky.py").write_text(
        "def reward(prompt, response):\n"
        "    number = len(response) % 4\n"
        "    if number == 0:\n"
        "        raise RuntimeError('no')\n"
        "    return float('nan') if number == 1 else 1.0\n"
    )
    (folder / "varied.py").write_text(
        "def reward(prompt, response):\n    return float(sum(map(ord, response)) % 7)\n"
    )
    (folder / "unlike.py").write_text(
        "def reward(prompt, response):\n"
        "    if response.startswith(('Dear ', 'Hello.')):\n"
        "        raise RuntimeError('a reference')\n"
        "    return 1.0\n"
    )
    (folder / "endless.py").write_text(
        "def reward(prompt, response):\n    while 'hill' in prompt:\n        pass\n    return 1.0\n"
    )
    (folder / "never.py").write_text(
        "def reward(prompt, response):\n    raise RuntimeError('no')\n"
    )
    return folder


@pytest.fixture(scope="module")
def mesh():
    joined = create_mesh(Config().parallel)
    yield joined
    destroy_mesh(leave_world=False)
    dist.destroy_process_group()


def config_of(files, run_dir, **changes):
    base = {
        "run": {"dir": run_dir, "steps": 2},
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "init_std": 0.2},
        "tokenizer": {"path": files / "tok"},
        "data": {"train_path": files / "prompts.jsonl", "max_prompt_tokens": 64},
        "policy": {"lr": 1e-3},
        "rollout": {"batch_size": 8, "max_response_tokens": 12},
        "ppo": {"minibatch_size": 4, "microbatch_size": 2},
        "reward": {"source": "marlhf_mega.data.toy:gold_reward"},
        "checkpoint": {"export_hf": False},
        "logging": {"tensorboard": False},
    }
    for section, values in changes.items():
        base[section] = {**base.get(section, {}), **values}
    return Config.model_validate(base)


def metrics_of(files, mesh, run_dir, **changes):
    inputs = read_inputs(config_of(files, run_dir, **changes), "ppo", 1)
    with Watchdog(inputs.config, mesh) as watchdog:
        run_ppo(inputs, mesh, watchdog)
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "perf/", "rollout/tokens_"))}
        for line in found
    ]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains(files, mesh, tmp_path, rule):
    found = metrics_of(files, mesh, tmp_path, macro={"rule": rule, **RULES[rule]})[-1]
    assert_reported(tmp_path, "ppo")
    assert found["policy/grad_norm"] > 0
    assert found["critic/grad_norm"] > 0
    per_action = found["macro/tokens_per_action"]
    if rule == "token":
        assert per_action == 1
    if rule == "whole_response":
        assert found["macro/actions_per_response"] == 1
    if rule == "fixed_ngram":
        assert 2 < per_action <= 3


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(files, mesh, tmp_path, monkeypatch, method):
    monkeypatch.syspath_prepend(str(files))
    ppo, macro, samples = METHODS[method]
    options = {"rollout": {"samples_per_prompt": samples}, "reward": {"source": "varied:reward"}}
    found = metrics_of(files, mesh, tmp_path, ppo=ppo, macro=macro, **options)
    has_critic = method in ("sae", "vapo", "masked")
    without = set() if has_critic else {"critic/explained_variance"}
    if ppo.get("objective") == "pg":
        without.add("policy/clip_fraction")
    assert_reported(tmp_path, "ppo", without=without)
    for line in found:
        assert line["policy/grad_norm"] > 0
        assert ("critic/grad_norm" in line) == has_critic
        assert any(name.startswith("critic/") for name in line) == has_critic


@pytest.mark.parametrize("reward", REWARDS)
def test_every_reward_trains(files, mesh, tmp_path, monkeypatch, reward):
    monkeypatch.syspath_prepend(str(files))
    keys, ppo = REWARDS[reward]
    keys = {"source": "varied:reward"} | keys
    data = {"train_path": files / "drafts.jsonl"}
    options = {"logging": {"samples_interval": 1}, "data": data}
    if reward == "constrained":
        options["rollout"] = {"filter": "pf_ppo"}
    for line in metrics_of(files, mesh, tmp_path, reward=keys, ppo=ppo, **options):
        assert all(value == value for value in line.values())
        assert line["policy/grad_norm"] > 0
        assert line["rollout/invalid_fraction"] == 0
        assert ("rollout/violation_fraction" in line) == (reward in ("constrained", "calibrated"))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        if reward in ("shaped", "calibrated"):
            assert sample["shaped"] != sample["score"]
        if reward == "constrained":
            assert sample["shaped"] == (min(sample["score"], 5) if sample["score"] >= 3 else 0)
            advantages = [action["advantage"] for action in sample["actions"]]
            assert sample["score"] >= 3 or max(advantages) <= 0
    if reward == "calibrated":
        assert all(0 < sample["shaped"] < 1 for sample in samples)


@pytest.fixture(scope="module")
def exported(files, mesh, tmp_path_factory):
    """A run whose language model and critic serve as judges."""
    folder = tmp_path_factory.mktemp("exported")
    metrics_of(files, mesh, folder, checkpoint={"export_hf": True})
    return folder


def test_templates_give_the_scores_of_transformers(files, mesh, tmp_path, exported):
    """A reward model that reads another text, and what a language model answers to a question."""
    question = "{response} {prompt} Are {drafts} like it?"
    terms = [
        {"source": str(exported / "hf"), "template": question, "answers": [" Yes", " No"]},
        {"source": str(exported / "hf_critic"), "template": question, "weight": 2.0},
    ]
    reward, data = {"source": terms}, {"train_path": files / "drafts.jsonl"}
    logging = {"samples_interval": 1}
    metrics_of(files, mesh, tmp_path, reward=reward, data=data, logging=logging, run={"steps": 1})
    drafts = {
        row["prompt"]: row["drafts"]
        for row in map(json.loads, (files / "drafts.jsonl").read_text().splitlines())
    }
    tokenizer = Tokenizer.load(files / "tok")
    model = AutoModelForCausalLM.from_pretrained(exported / "hf")
    judge = AutoModelForSequenceClassification.from_pretrained(exported / "hf_critic")

    def score(sample):
        own = drafts[sample["prompt"]]
        asked = own if isinstance(own, str) else "\n".join(own)
        text = f"{sample['response']} {sample['prompt']} Are {asked} like it?"
        ids = tokenizer.encode(text)
        with torch.no_grad():
            answers = [
                model(torch.tensor([ids + answer]))
                .logits[0]
                .log_softmax(-1)[range(len(ids) - 1, len(ids) - 1 + len(answer)), answer]
                for answer in tokenizer.encode_batch([" Yes", " No"])
            ]
            own_score = judge(torch.tensor([ids])).logits.item()
        return float(answers[0].sum() - answers[1].sum()) + 2 * own_score

    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    found = [sample["score"] for sample in samples]
    assert len(set(found)) > 1
    assert found == pytest.approx([score(sample) for sample in samples], abs=1e-4)


def test_dense_rewards_are_those_of_transformers(files, mesh, tmp_path, exported):
    """Every token by the log-ratio of a language model, sentences and clauses by a reward model."""
    dense = [
        {"source": str(exported / "hf"), "kind": "rto", "weight": 0.05, "clip": 0.05},
        {"source": str(exported / "hf_critic"), "kind": "sentence", "weight": 0.3},
        {"source": str(exported / "hf_critic"), "kind": "clause"},
    ]
    changes = {"reward": {"dense": dense}, "run": {"steps": 1}}
    (line,) = metrics_of(files, mesh, tmp_path, **changes)
    assert line["rollout/dense_reward"] != 0
    tokenizer = Tokenizer.load(files / "tok")
    texts = ["Dear Anna, see you. Bye!", "Hello; the lamp. I"]
    prompts = [tokenizer.encode("Write."), tokenizer.encode("A note")]
    responses = [[*tokenizer.encode(texts[0]), tokenizer.eos_id], tokenizer.encode(texts[1])]
    rollout = Rollout(
        prompts=prompts,
        responses=responses,
        finished=[True, False],
        sample_indices=[0, 1],
        logprobs=torch.zeros(2, max(map(len, responses))),
    )
    inputs = read_inputs(config_of(files, tmp_path / "other", **changes), "ppo", 1)
    run = PpoRun(inputs, mesh, Watchdog(inputs.config, mesh))
    limit = MicrobatchLimit(sequences=2)
    batches = make_batches(prompts, responses, limit=limit, mesh=mesh)
    reference = torch.full_like(rollout.logprobs, -6.0)
    found = run.scorer.dense(rollout, batches, ref_logprobs=reference, temperature=1.0)
    run.scorer.close()
    model = AutoModelForCausalLM.from_pretrained(exported / "hf")
    judge = AutoModelForSequenceClassification.from_pretrained(exported / "hf_critic")
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        pieces = [tokenizer.decode([token]) for token in response]
        spoken = len(response) - (row == 0)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        for t, token in enumerate(response):
            ratio = logits[len(prompt) + t - 1, token].item() + 6
            expected = min(max(0.05 * ratio, -0.05), 0.05)
            with torch.no_grad():
                score = judge(torch.tensor([prompt + response[: t + 1]])).logits.item()
            is_last = t + 1 == len(response)
            # The end token has no text: it ends what is before it.
            before_end = t + 1 == spoken < len(response)
            ends = pieces[t].rstrip().endswith((".", "!", "?")) and not before_end
            expected += 0.3 * score * (is_last or ends)
            pauses = pieces[t].rstrip().endswith((",", ":", ";"))
            expected += score * (is_last or ends or pauses)
            assert found[row, t].item() == pytest.approx(expected, abs=1e-5)


def test_values_of_vine_are_the_mean_scores_of_continuations(files, mesh, tmp_path, monkeypatch):
    """Generated and scored one by one, with the draws that belong to sample, place and time."""
    monkeypatch.syspath_prepend(str(files))
    config = config_of(
        files,
        tmp_path,
        rollout={"max_response_tokens": 6, "batch_size": 4},
        macro={"n": 3},
        ppo={"estimator": "vine", "vine_samples": 2, "kl_coef": 0, "whiten_advantages": False},
        reward={"source": "varied:reward", "missing_eos": "subtract", "missing_eos_penalty": 0.5},
    )
    inputs = read_inputs(config, "ppo", 1)
    run = PpoRun(inputs, mesh, Watchdog(inputs.config, mesh))
    prompts, rollout = run.rollouts.next(3)
    rows = [prompt_row(prompt) for prompt in prompts]
    sums = step_sums()
    experience, details = run.builder.build(rollout, rows, step=3, kl_coef=0, sums=sums)
    options = RolloutOptions.of(inputs.config, step=3 + (1 << 41))

    def worth(sample, cut, time):
        begun = rollout.responses[sample][:cut]
        index = (sample * 6 + cut) * 2 + time
        found = run.generator.generate(
            [rollout.prompts[sample] + begun],
            [index],
            replace(options, max_response_tokens=6 - cut),
        )
        text = inputs.tokenizer.response_text(begun + found.responses[0])
        return sum(map(ord, text)) % 7 - 0.5 * (not found.finished[0])

    seen = set()
    for sample, response in enumerate(rollout.responses):
        starts = range(0, len(response), 3)
        tries = [[worth(sample, cut, time) for time in range(2)] for cut in starts]
        seen |= {score for scores in tries for score in scores}
        values = [sum(scores) / 2 for scores in tries] + [0.0]
        assert details.values[sample, : len(starts)].tolist() == pytest.approx(values[:-1])
        rewards = [0.0] * (len(starts) - 1) + [details.shaped[sample].item()]
        expected = [r + v - u for r, u, v in zip(rewards, values, values[1:], strict=False)]
        found = experience.advantages[sample, ::3][: len(starts)].tolist()
        assert found == pytest.approx(expected, abs=1e-5)
    assert len(seen) > 4
    assert experience.old_values is None
    run.evaluator.close()


def test_a_place_from_where_nothing_scores_leaves_its_sample_out(
    files, mesh, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(files))
    reward = {"source": "shaky:reward", "max_invalid_fraction": 1.0}
    settings = [{"estimator": "reinforce_pp"}] + [
        {"estimator": "vine", "vine_samples": samples} for samples in (9, 1)
    ]
    plain, often, once = (
        metrics_of(files, mesh, tmp_path / str(number), ppo=ppo, reward=reward, run={"steps": 1})
        for number, ppo in enumerate(settings)
    )
    # Half of all responses have no score: of nine continuations rarely all, of one often.
    lost = [found[0]["rollout/invalid_fraction"] for found in (plain, often, once)]
    assert 0 < lost[0] <= lost[1] <= lost[2]
    assert lost[0] < lost[2]


def test_a_run_without_a_critic_or_a_reference_keeps_none_and_resumes(files, mesh, tmp_path):
    changes = {
        "ppo": {"estimator": "grpo", "kl_coef": 0.0},
        "rollout": {"samples_per_prompt": 2},
        "memory": {"offload_idle": True, "offload_optimizer": True},
        "checkpoint": {"interval": 1, "export_hf": True},
    }
    whole = metrics_of(files, mesh, tmp_path / "whole", **changes)
    metrics_of(files, mesh, tmp_path / "parts", run={"steps": 1}, **changes)
    assert metrics_of(files, mesh, tmp_path / "parts", **changes)[-1] == whole[-1]
    assert "policy/kl" not in whole[-1]
    assert not list((tmp_path / "whole").rglob("*critic*"))
    assert (tmp_path / "whole" / "hf" / "config.json").is_file()


def test_only_what_compares_with_the_reference_builds_one(files, mesh, tmp_path):
    """A penalty of next to nothing gives the same numbers, and what says how far the policy is."""
    data = {"validation_path": files / "prompts.jsonl"}
    evaluate = {"num_prompts": 4, "batch_size": 4}
    with_one, without = (
        metrics_of(
            files,
            mesh,
            tmp_path / str(coefficient),
            data=data,
            evaluate=evaluate,
            ppo={"kl_coef": coefficient},
            logging={"samples_interval": 1},
        )[-1]
        for coefficient in (1e-12, 0.0)
    )
    only = {"policy/kl", "eval/kl", "eval/kl_stderr", "eval/kl_change", "eval/kl_change_stderr"}
    assert with_one.keys() - without.keys() == only
    for name in without.keys() - {"policy/kl_coef"}:
        assert without[name] == pytest.approx(with_one[name], rel=1e-5, abs=1e-6), name
    line = json.loads((tmp_path / "0.0" / "samples.jsonl").read_text().splitlines()[0])
    assert line["kl"] is line["actions"][0]["kl"] is None


def test_a_group_whose_samples_failed_partly_uses_the_rest(files, mesh, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(files))
    reward = {"source": "shaky:reward", "max_invalid_fraction": 1.0}
    options = {"reward": reward, "rollout": {"samples_per_prompt": 4}}
    first = metrics_of(files, mesh, tmp_path, ppo={"estimator": "rloo"}, **options)[0]
    assert 0 < first["rollout/invalid_fraction"] < 1
    # All that have a score have the same: none is better, although others of their group have 0.
    assert first["policy/grad_norm"] == pytest.approx(0, abs=1e-6)


def test_token_ppo_is_macro_ppo_with_actions_of_one_token(files, mesh, tmp_path):
    token = metrics_of(files, mesh, tmp_path / "a", macro={"rule": "token"})
    macro = metrics_of(files, mesh, tmp_path / "b", macro={"rule": "fixed_ngram", "n": 1})
    assert token == macro


def test_an_action_of_any_length_is_the_whole_response(files, mesh, tmp_path):
    whole = metrics_of(files, mesh, tmp_path / "a", macro={"rule": "whole_response"})
    long = metrics_of(files, mesh, tmp_path / "b", macro={"rule": "fixed_ngram", "n": 1000})
    assert whole == long


def test_the_compat_mode_makes_the_last_token_its_own_action(files, mesh, tmp_path):
    plain = metrics_of(files, mesh, tmp_path / "a", macro={"n": 5})[0]
    compat = metrics_of(files, mesh, tmp_path / "b", macro={"n": 5, "compat": "ma_rlhf"})[0]
    assert compat["macro/actions_per_response"] > plain["macro/actions_per_response"]


def test_the_loss_is_seven_frames_below_the_loop(files, mesh, tmp_path, monkeypatch):
    """Nine from `main`, which calls `PreparedJob.run`, which calls the loop."""
    found = []

    def spy(*arguments, **options):
        paths = [(Path(f.filename), f.name) for f in traceback.extract_stack()[:-1]]
        own = [name for path, name in paths if PACKAGE in path.parents]
        found.append([*own[own.index("run_ppo") :], "policy_loss"])
        return policy_loss(*arguments, **options)

    monkeypatch.setattr(update, "policy_loss", spy)
    metrics_of(files, mesh, tmp_path)
    assert found[0] == [
        "run_ppo",
        "step",
        "ppo_update",
        "pipeline_forward_backward",
        "reduce",
        "policy_objective",
        "policy_loss",
    ]


def test_the_microbatch_size_changes_nothing(files, mesh, tmp_path):
    small = metrics_of(files, mesh, tmp_path / "a", ppo={"microbatch_size": 1})
    large = metrics_of(files, mesh, tmp_path / "b", ppo={"microbatch_size": 4})
    for one, other in zip(small, large, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_a_sample_without_a_score_is_masked_and_counted(files, mesh, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(files))
    reward = {"source": "shaky:reward", "max_invalid_fraction": 1.0}
    found = metrics_of(files, mesh, tmp_path, reward=reward)[-1]
    assert 0 < found["rollout/invalid_fraction"] < 1
    assert found["rollout/score_mean"] == 1.0


@pytest.mark.parametrize("estimator", ["gae", "vine"])
def test_a_step_without_any_score_teaches_nothing(files, mesh, tmp_path, monkeypatch, estimator):
    monkeypatch.syspath_prepend(str(files))
    reward = {"source": "never:reward", "max_invalid_fraction": 1.0}
    ppo = {"kl_target": 6.0, "estimator": estimator}
    found = metrics_of(files, mesh, tmp_path, reward=reward, ppo=ppo)[-1]
    assert found["rollout/invalid_fraction"] == 1
    # No minibatch makes an optimizer step.
    assert not {"policy/grad_norm", "critic/grad_norm"} & found.keys()
    assert found["policy/kl_coef"] == 0.05


def test_a_replica_without_a_held_out_prompt_judges_with_the_others(files, mesh, tmp_path):
    data = {"validation_path": files / "prompts.jsonl"}
    inputs = read_inputs(config_of(files, tmp_path, data=data), "ppo", 1)
    run = PpoRun(inputs, mesh, Watchdog(inputs.config, mesh))
    run.evaluator.prompts = []
    judged = run.evaluator.judge(run.policy, run.roles.reference)
    limit = MicrobatchLimit(sequences=2)
    scores = last_token_scores(
        run.roles.critic.chunks, make_batches([], [], limit=limit, mesh=mesh)
    )
    run.scorer.close()
    assert (judged.results.metrics, judged.scores, scores.tolist()) == ({}, [], [])


def test_held_out_answers_that_violate_a_constraint_are_counted(files, mesh, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(files))
    inputs = read_inputs(
        config_of(
            files,
            tmp_path,
            data={"validation_path": files / "prompts.jsonl"},
            evaluate={"num_prompts": 8, "batch_size": 8},
            reward={
                "source": "varied:reward",
                "constraints": [
                    {"source": "varied:reward", "threshold": 3},
                    {"source": "shaky:reward", "threshold": 1},
                ],
            },
        ),
        "ppo",
        1,
    )
    run = PpoRun(inputs, mesh, Watchdog(inputs.config, mesh))
    judged = run.evaluator.judge(run.policy, run.roles.reference)
    run.scorer.close()
    known = [score for score in judged.scores if score == score]
    assert 0 < len(known) < 8
    broken = sum(score < 3 for score in known) / len(known)
    assert judged.results.metrics["eval/violation_fraction"] == pytest.approx(broken)


def test_a_resume_takes_a_changed_coefficient_and_fewer_held_out_prompts(files, mesh, tmp_path):
    data = {"validation_path": files / "prompts.jsonl"}
    first = {"num_prompts": 8, "batch_size": 8}
    metrics_of(files, mesh, tmp_path, run={"steps": 1}, data=data, evaluate=first)
    found = metrics_of(
        files,
        mesh,
        tmp_path,
        data=data,
        evaluate=first | {"num_prompts": 2},
        ppo={"kl_coef": 0.2},
        checkpoint={"allow_changed": ["ppo.kl_coef"]},
    )
    assert [line["policy/kl_coef"] for line in found[1:]] == [0.05, 0.2]
    assert found[-1]["eval/win_rate"] in (0, 0.25, 0.5, 0.75, 1)


def test_an_endless_loop_in_a_rule_only_masks_its_sample(files, mesh, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(files))
    term = {"source": "endless:reward", "timeout_seconds": 0.5}
    found = metrics_of(
        files,
        mesh,
        tmp_path,
        run={"steps": 1},
        data={"shuffle": False},
        reward={"source": [term], "max_invalid_fraction": 1.0},
    )[-1]
    prompts = [prompt["prompt"] for prompt in toy.generate_prompts(0, 32)][:8]
    looping = sum("hill" in prompt for prompt in prompts)
    assert found["rollout/invalid_fraction"] == looping / 8
    assert 0 < looping < 8


def test_too_many_samples_without_a_score_stop_the_run(files, mesh, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(files))
    reward = {"source": "shaky:reward", "max_invalid_fraction": 0.0}
    with pytest.raises(RuntimeError, match=r"^reward\.max_invalid_fraction=0: "):
        metrics_of(files, mesh, tmp_path, reward=reward)


class HalfScores(BaseHTTPRequestHandler):
    """A reward server that has no score for every second response."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        scores = [2.0 if index % 2 else None for index in range(len(body["responses"]))]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"scores": scores}).encode())

    def log_message(self, *_):
        pass


def test_a_server_scores_and_what_it_cannot_score_is_masked_and_counted(files, mesh, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), HalfScores)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    reward = {"source": f"http://127.0.0.1:{server.server_port}/score"}
    found = metrics_of(files, mesh, tmp_path, reward=reward)[-1]
    server.shutdown()
    server.server_close()
    assert found["rollout/invalid_fraction"] == 0.5
    assert found["rollout/score_mean"] == 2.0


@pytest.mark.parametrize("samples", [0, 2])
def test_prompts_are_written_only_where_the_config_says_so(files, mesh, tmp_path, caplog, samples):
    caplog.set_level("DEBUG")
    run_dir = tmp_path / "run"
    changes = {
        "logging": {"samples": samples, "samples_interval": 1, "tensorboard": True},
        "data": {"validation_path": files / "prompts.jsonl", "max_prompt_tokens": 64},
        "evaluate": {"num_prompts": 8, "batch_size": 8},
    }
    metrics_of(files, mesh, run_dir, **changes)
    inputs = read_inputs(config_of(files, run_dir / "later", **changes), "evaluate", 1)
    with Watchdog(inputs.config, mesh) as watchdog:
        run_evaluate(inputs, mesh, watchdog)
    lines = (files / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"].splitlines()[0] for line in lines]
    written = {
        path.name.partition(".tfevents")[0]
        for path in run_dir.rglob("*")
        if path.is_file()
        for text in [path.read_bytes()]
        if any(prompt.encode() in text for prompt in prompts)
    }
    shown = {"samples.jsonl", "report.html", "events.out"}
    assert written == (shown if samples else set())
    assert not any(prompt in caplog.text for prompt in prompts)


def test_two_policies_are_compared_on_the_same_prompts(files, mesh, tmp_path, capsys):
    """Each by itself gives the same scores, from which the win rate is counted here."""
    changes = {
        "data": {"validation_path": files / "prompts.jsonl", "max_prompt_tokens": 64},
        "reward": {"source": f"{files}/varied.py:reward"},
        "evaluate": {
            "num_prompts": 12,
            "batch_size": 8,
            "gold": "marlhf_mega.data.toy:gold_reward",
        },
    }
    runs = {name: tmp_path / name for name in ("ours", "theirs")}
    for rate, (name, run) in zip((1e-3, 2e-2), runs.items(), strict=True):
        kept = {"policy": {"lr": rate}, "checkpoint": {"export_hf": name == "theirs"}}
        metrics_of(files, mesh, run, **changes, **kept, run={"dir": run, "steps": 1})

    def evaluation(name, policy, against=None):
        settings = changes | {"evaluate": changes["evaluate"] | {"against": against}}
        keys = [f"model.init={policy}", f"run.dir={tmp_path / name}"]
        written = tmp_path / f"{name}.yaml"
        written.write_text(dump_config(config_of(files, tmp_path / name, **settings)))
        inputs = read_inputs(load_config(written, keys), "evaluate", 1)
        with Watchdog(inputs.config, mesh) as watchdog:
            metrics = run_evaluate(inputs, mesh, watchdog)
        lines = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        return metrics, [json.loads(line) for line in lines]

    ours, our_samples = evaluation("a", runs["ours"])
    theirs, their_samples = evaluation("b", runs["theirs"])
    capsys.readouterr()
    both, samples = evaluation("c", runs["ours"], against=str(runs["theirs"]))
    shown = capsys.readouterr().out
    assert samples == our_samples
    assert both.items() >= ours.items()
    assert both.items() >= {k.replace("eval/", "other/"): v for k, v in theirs.items()}.items()
    for judge, prefix in (("score", ""), ("gold", "gold_")):
        pairs = [(a[judge], b[judge]) for a, b in zip(our_samples, their_samples, strict=True)]
        wins = sum(a > b for a, b in pairs) + sum(a == b for a, b in pairs) / 2
        assert both[f"eval/{prefix}win_rate_over_other"] == pytest.approx(wins / 12)
        mean = sum(a - b for a, b in pairs) / 12
        assert both[f"eval/{judge}_change"] == pytest.approx(mean, abs=1e-6)
    (line,) = (tmp_path / "c" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 0, **both}
    rate = 100 * both["eval/win_rate_over_other"]
    assert f"win rate over {runs['theirs']} by reward model score: {rate:.1f} % (95 % in" in shown
    page = (tmp_path / "c" / "report.html").read_text()
    assert "win rate over the other policy" in page
    assert "95 % interval" in page
    # Its export is the same policy, against which nobody wins.
    same, _ = evaluation("d", runs["theirs"], against=str(runs["theirs"] / "hf"))
    name = "eval/win_rate_over_other"
    assert [same[f"{name}{end}"] for end in ("", "_low", "_high", "_ties")] == [0.5, 0.5, 0.5, 1.0]


def test_ids_that_only_the_model_has_are_sampled_and_are_no_text(files, mesh, tmp_path, caplog):
    """Models are often released with more rows than their tokenizer has pieces."""
    caplog.set_level("INFO")
    metrics_of(
        files,
        mesh,
        tmp_path,
        model={"vocab_size": 5000},
        data={"max_prompt_tokens": 20, "long_prompts": "truncate"},
        macro={"rule": "sentence"},
        logging={"samples_interval": 1},
    )
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    tokens = [token for sample in samples for token in sample["tokens"]]
    assert tokens.count("") > len(tokens) / 2
    assert all("".join(sample["tokens"]) == sample["response"] for sample in samples)
    assert "prompts.jsonl: 32 rows, 0 dropped (prompt too long), 32 prompts trunc" in caplog.text


def test_weights_of_a_sampler_that_agrees_with_the_trainer_change_nothing(files, mesh, tmp_path):
    plain = metrics_of(files, mesh, tmp_path / "plain")[-1]
    weighted = metrics_of(files, mesh, tmp_path / "weighted", ppo={"tis_cap": 2.0})[-1]
    assert weighted["rollout/logprob_gap_max"] < 1e-4
    assert weighted["policy/grad_norm"] == pytest.approx(plain["policy/grad_norm"], rel=1e-3)


def test_log_probs_of_the_sampler_serve_as_the_trainers(files, mesh, tmp_path):
    plain = metrics_of(files, mesh, tmp_path / "plain")[0]
    sampled = metrics_of(files, mesh, tmp_path / "sampled", ppo={"old_logprobs": "sampler"})[0]
    assert "rollout/logprob_gap" not in sampled
    for name in ("policy/kl", "policy/grad_norm", "policy/loss", "critic/loss"):
        assert sampled[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5)


def test_the_mask_policy_is_an_older_copy_and_a_resume_has_it(files, mesh, tmp_path):
    """The fourth step's is of the third; a copy of every step is one that is the policy itself."""
    changes = {
        "run": {"steps": 4},
        "rollout": {"top_p": 0.5, "mask_interval": 2, "mask_min_tokens": 1},
        "policy": {"lr": 0.02},
        "checkpoint": {"interval": 3, "keep": 2},
    }
    whole = metrics_of(files, mesh, tmp_path, **changes)
    shutil.rmtree(tmp_path / "checkpoints" / "step_000004")
    again = metrics_of(files, mesh, tmp_path, **changes)
    assert again == whole
    assert any((tmp_path / "checkpoints" / "step_000003" / "mask").iterdir())
    newest = changes | {"rollout": changes["rollout"] | {"mask_interval": 1}}
    found = metrics_of(files, mesh, tmp_path / "newest", **newest)
    assert [a == b for a, b in zip(found, whole, strict=True)][:2] == [True, False]
    assert all(line["rollout/kept_probability"] >= 0.5 for line in found)
    assert whole[3]["rollout/kept_probability"] != found[3]["rollout/kept_probability"]
