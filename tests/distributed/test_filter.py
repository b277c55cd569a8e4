"""What a filter trains on: by hand from what was generated, and the same at every layout."""

import json
import re

import pytest

from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer
from tests.distributed.ranks import run_ranks

REWARD = """
def reward(prompt, response):
    return float(sum(map(ord, response)) % 3)
"""
GROUPS = {"estimator": "grpo", "whiten_advantages": True}
# Keys of rollout and of ppo.
CASES = {
    "pf_ppo": ({"samples_per_prompt": 1}, {"minibatch_size": 4}),
    "best_of_n": ({"samples_per_prompt": 4}, {"minibatch_size": 2, "packing": True}),
    "best_worst": ({"samples_per_prompt": 4}, {"minibatch_size": 2, **GROUPS}),
    "best_random": ({"samples_per_prompt": 4}, {"minibatch_size": 4, "estimator": "remax"}),
    "dynamic": (
        {"samples_per_prompt": 2, "filter_tries": 3},
        {"minibatch_size": 4, "microbatch_tokens": 160, **GROUPS},
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filter")
    train_tokenizer(toy.tokenizer_text(0, 300), folder / "tok", vocab_size=400)
    write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 64))
    (folder / "reward.py").write_text(REWARD)
    return folder


def case(files, run_dir, name, **rollout):
    settings, ppo = CASES[name]
    return {
        "run": {"dir": str(run_dir), "steps": 2},
        "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "init_std": 0.2},
        "tokenizer": {"path": str(files / "tok")},
        "data": {"train_path": str(files / "prompts.jsonl"), "max_prompt_tokens": 64},
        "policy": {"lr": 1e-3},
        "rollout": {"batch_size": 8, "max_response_tokens": 10, "filter": name}
        | settings
        | rollout,
        "ppo": {"microbatch_size": 2, "epochs": 1} | ppo,
        "reward": {"source": f"{files / 'reward.py'}:reward"},
        "checkpoint": {"export_hf": False},
        "logging": {"tensorboard": False, "samples_interval": 1},
    }


def run(files, folder, ranks, names=tuple(CASES), rollout=None):
    """Return what each case generated and trained on, and its metrics."""
    cases = [case(files, folder / name, name, **(rollout or {})) for name in names]
    found = run_ranks("filter_ranks.py", ranks, folder / "out.json", json.dumps(cases))
    return {name: (steps, numbers(folder / name)) for name, steps in zip(names, found, strict=True)}


def numbers(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if not re.match("time/|perf/|.*_per_s", k)} for x in lines]


@pytest.fixture(scope="module")
def one(files, tmp_path_factory):
    return run(files, tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two(files, tmp_path_factory):
    return run(files, tmp_path_factory.mktemp("two"), 2)


def groups_of(batch, size):
    """Return the prompt and the responses of every group."""
    rows = [batch[start : start + size] for start in range(0, len(batch), size)]
    assert all(len({prompt for _, prompt, *_ in row}) == 1 for row in rows)
    return rows


def answers(rows):
    return [(prompt, tuple(response)) for _, prompt, response, _ in rows]


def trained(steps):
    """Return (generated, trained on) of every step."""
    return list(zip(steps["next"], steps["choose"], strict=True))


@pytest.fixture(scope="module")
def score(files):
    from marlhf_mega.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(files / "tok")
    scope = {}
    exec(REWARD, scope)
    return lambda row: scope["reward"](row[1], tokenizer.response_text(row[2]))


@pytest.mark.parametrize("name", CASES)
def test_two_replicas_train_on_the_samples_of_one_rank(one, two, name):
    steps, lines = one[name]
    assert two[name][0] == steps
    for line, expected in zip(two[name][1], lines, strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_samples_keep_their_prompts_and_scores(one, score, name):
    for _, chosen in trained(one[name][0]):
        assert [index for index, *_ in chosen] == list(range(len(chosen)))
        assert [row[3] for row in chosen] == [score(row) for row in chosen]


def test_drawn_by_score_are_only_those_that_have_one(one, score):
    steps, lines = one["pf_ppo"]
    for (generated, chosen), line in zip(trained(steps), lines, strict=True):
        allowed = {
            a for a, row in zip(answers(generated), generated, strict=True) if score(row) != 0
        }
        assert set(answers(chosen)) <= allowed
        assert line["rollout/distinct_samples"] == len({*answers(chosen)})
        assert line["rollout/kept_fraction"] == line["rollout/distinct_samples"] / 8
        mean = sum(map(score, generated)) / 8
        assert line["rollout/unfiltered_score"] == pytest.approx(mean)


def test_the_best_of_each_prompt_is_trained_on(one, score):
    steps, lines = one["best_of_n"]
    for (generated, chosen), line in zip(trained(steps), lines, strict=True):
        best = [max(group, key=score) for group in groups_of(generated, 4)]
        assert answers(chosen) == answers(best)
        assert line["rollout/kept_fraction"] == 1 / 4
        assert line["rollout/score_mean"] == pytest.approx(sum(map(score, best)) / 2)
        lengths = [len(response) for _, _, response, _ in best]
        assert line["rollout/response_tokens"] == pytest.approx(sum(lengths) / 2)


def test_the_best_and_the_worst_are_compared(one, score):
    for generated, chosen in trained(one["best_worst"][0]):
        for group, (best, worst) in zip(groups_of(generated, 4), groups_of(chosen, 2), strict=True):
            values = [score(row) for row in group]
            assert (score(best), score(worst)) == (max(values), min(values))
            assert {*answers([best, worst])} <= {*answers(group)}


def test_the_best_and_another_are_trained_on(one, score):
    for generated, chosen in trained(one["best_random"][0]):
        for group, (best, other) in zip(groups_of(generated, 4), groups_of(chosen, 2), strict=True):
            assert score(best) == max(score(row) for row in group)
            indices = [answers(group).index(a) for a in answers([best, other])]
            assert len({*indices}) == 2


def test_prompts_whose_responses_score_alike_are_replaced(one, score):
    """By the next prompts of the data; those of the last try stay as they are."""
    steps, lines = one["dynamic"]
    more = iter(steps.get("more", []))
    order = [prompt["prompt"] for prompt in toy.generate_prompts(0, 64)]
    used = []
    for (generated, chosen), line in zip(trained(steps), lines, strict=True):
        groups, tries = groups_of(generated, 2), 1
        used += [group[0][1] for group in groups]
        while tries < 3:
            alike = [i for i, g in enumerate(groups) if len({score(row) for row in g}) == 1]
            if not alike:
                break
            new = next(more)
            assert new[0][0] == 8 if tries == 1 else new[0][0] > 8
            for i, group in zip(alike, groups_of(new, 2), strict=True):
                groups[i] = group
                used.append(group[0][1])
            tries += 1
        assert answers(chosen) == answers([row for group in groups for row in group])
        assert line["rollout/generation_tries"] == tries
    assert next(more, None) is None
    assert len(used) == len({*used}) > 8
    assert {*used} <= {*order}


def test_a_resumed_run_takes_the_prompts_after_the_replaced_ones(files, one, tmp_path):
    again = case(files, tmp_path / "run", "dynamic")
    again["checkpoint"]["interval"] = 1
    first = again | {"run": again["run"] | {"steps": 1}}
    run_ranks("filter_ranks.py", 1, tmp_path / "first.json", json.dumps([first]))
    (found,) = run_ranks("filter_ranks.py", 1, tmp_path / "second.json", json.dumps([again]))
    assert found["choose"] == one["dynamic"][0]["choose"][1:]
    assert numbers(tmp_path / "run")[-1] == one["dynamic"][1][-1]


def test_ranks_that_only_generate_answer_the_new_prompts_too(files, one, tmp_path):
    found, lines = run(files, tmp_path, 2, ["dynamic"], rollout={"ranks": 1})["dynamic"]
    assert found == one["dynamic"][0]
    own = {"rollout/staleness", "rollout/reshard_gib"}
    for line, expected in zip(lines, one["dynamic"][1], strict=True):
        assert {k: v for k, v in line.items() if k not in own} == expected
