"""PPO with a rule reward under every macro rule, in one process: the real loop, a tiny model."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch.distributed as dist

from marlhf_mega.config.schema import Config
from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.data.train_tokenizer import train_tokenizer
from marlhf_mega.experience.scoring import last_token_scores
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from marlhf_mega.train.evaluate import evaluate_inputs, run_evaluate
from marlhf_mega.train.ppo import PpoRun, ppo_inputs, run_ppo

RULES = {
    "token": {},
    "fixed_ngram": {"n": 3, "ratio": "macro", "value": "position"},
    "random_ngram": {"value": "unit", "value_target": "macro"},
    "perplexity": {"perplexity": "segment", "ratio": "macro_geo", "reward": "mean"},
    "parsing": {"eos": "own", "min_length": 2},
    "sentence": {"discount": "per_token", "lambda_unit": "per_token", "max_length": 8},
    "whole_response": {"value": "first"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rules")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 32))
    (folder / "shaky.py").write_text(
        "def reward(prompt, response):\n"
        "    number = len(response) % 4\n"
        "    if number == 0:\n"
        "        raise RuntimeError('no')\n"
        "    return float('nan') if number == 1 else 1.0\n"
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
    run_ppo(ppo_inputs(config_of(files, run_dir, **changes), 1), mesh)
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "perf/", "rollout/tokens_"))}
        for line in found
    ]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains(files, mesh, tmp_path, rule):
    found = metrics_of(files, mesh, tmp_path, macro={"rule": rule, **RULES[rule]})[-1]
    assert found["policy/grad_norm"] > 0
    assert found["critic/grad_norm"] > 0
    per_action = found["macro/tokens_per_action"]
    if rule == "token":
        assert per_action == 1
    if rule == "whole_response":
        assert found["macro/actions_per_response"] == 1
    if rule == "fixed_ngram":
        assert 2 < per_action <= 3


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


def test_a_step_without_any_score_teaches_nothing(files, mesh, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(files))
    reward = {"source": "never:reward", "max_invalid_fraction": 1.0}
    found = metrics_of(files, mesh, tmp_path, reward=reward, ppo={"kl_target": 6.0})[-1]
    assert found["rollout/invalid_fraction"] == 1
    assert found["policy/grad_norm"] == found["critic/grad_norm"] == 0
    assert found["policy/kl_coef"] == 0.05


def test_a_replica_without_a_held_out_prompt_judges_with_the_others(files, mesh, tmp_path):
    data = {"validation_path": files / "prompts.jsonl"}
    run = PpoRun(ppo_inputs(config_of(files, tmp_path, data=data), 1), mesh)
    run.evaluator.prompts = []
    judged = run.evaluator.judge(run.policy, run.roles.reference)
    limit = MicrobatchLimit(rows=2)
    scores = last_token_scores(run.roles.critic.chunks, [], [], mesh=mesh, limit=limit)
    run.scorer.close()
    assert (judged.metrics, judged.scores, scores.tolist()) == ({}, [], [])


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
    run_evaluate(evaluate_inputs(config_of(files, run_dir / "later", **changes), 1), mesh)
    lines = (files / "prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"].splitlines()[0] for line in lines]
    written = {
        path.name
        for path in run_dir.rglob("*")
        if path.is_file()
        for text in [path.read_bytes()]
        if any(prompt.encode() in text for prompt in prompts)
    }
    assert written == ({"samples.jsonl", "report.html"} if samples else set())
    assert not any(prompt in caplog.text for prompt in prompts)


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
    weighted = metrics_of(files, mesh, tmp_path / "weighted", ppo={"sampler_cap": 2.0})[-1]
    assert weighted["rollout/logprob_gap_max"] < 1e-4
    assert weighted["policy/grad_norm"] == pytest.approx(plain["policy/grad_norm"], rel=1e-3)


def test_log_probs_of_the_sampler_serve_as_the_trainers(files, mesh, tmp_path):
    plain = metrics_of(files, mesh, tmp_path / "plain")[0]
    sampled = metrics_of(files, mesh, tmp_path / "sampled", ppo={"old_logprobs": "sampler"})[0]
    assert "rollout/logprob_gap" not in sampled
    for name in ("policy/kl", "policy/grad_norm", "policy/loss", "critic/loss"):
        assert sampled[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-5)
