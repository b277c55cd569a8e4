"""Every shipped configuration, built rank by rank without memory; what is refused or found wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marlhf_mega.cli import main
from marlhf_mega.commands import dry_run as module
from marlhf_mega.commands.dry_run import dry_run
from marlhf_mega.config.load import load_config

FOUND = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
FILES = [path for path in FOUND if not path.stem.startswith("hf_small_")]  # the user has the model
BIG = "llama3_70b_ppo"
TOY = ["model.vocab_size=100", "reward.source=marlhf_mega.data.toy:gold_reward"]
PPO = [*TOY, "parallel.tensor_size=2", "parallel.pipeline_size=2", "model.num_layers=4"]


def world_of(path):
    found = re.search(r"^# Plan: (\d+) x (\d+) ", path.read_text(), re.MULTILINE)
    return 4 if found is None else int(found[1]) * int(found[2])


@pytest.mark.parametrize("path", [f for f in FILES if f.stem != BIG], ids=lambda p: p.stem)
def test_a_shipped_config_builds_on_every_rank(path):
    overrides = ["model.init=random", "model.vocab_size=8192"] if "e2e" in path.stem else []
    config = load_config(path, overrides, need_weights=False)
    lines, problems = dry_run(config, path.stem.rsplit("_", 1)[1], world_of(path))
    assert problems == []
    assert any(line.startswith("FP8: ") for line in lines) == ("fp8" in path.stem)
    first = (
        f"dry run: {path.stem.rsplit('_', 1)[1]} on {world_of(path) - config.rollout.ranks} ranks: "
    )
    assert first in lines[0]


def test_70b_on_128_ranks_takes_less_than_two_minutes_and_4_gb():
    (path,) = [f for f in FILES if f.stem == BIG]
    code = (
        "import resource, sys, time\n"
        "from marlhf_mega.cli import main\n"
        "start = time.process_time()\n"
        f"arguments = ['ppo', '--config', {str(path)!r}, '--dry-run', '--world-size', '128']\n"
        "assert main(arguments) == 0\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(time.process_time() - start, peak, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    seconds, kilobytes = map(float, done.stderr.splitlines()[-1].split())
    assert seconds < 120
    assert kilobytes * 1024 < 4e9
    lines = done.stdout.splitlines()
    assert "128 ranks: TP8 x PP4 x DP4 + SP" in lines[0]
    assert "32 distinct ranks" in lines[0]
    sizes = "2,270,756,864, 2,139,422,720, 2,139,422,720, 2,270,765,056"
    assert f"policy: parameters of a rank by stage {sizes}" in lines
    assert "export: 723 Hugging Face tensors" in lines
    assert lines[-1] == "nothing fails"


def test_a_layout_of_the_rollouts_own_and_virtual_stages():
    config = load_config(
        None, [*PPO, "rollout.pipeline_size=1", "parallel.virtual_pipeline_size=2"]
    )
    lines, problems = dry_run(config, "ppo", 8)
    assert problems == []
    assert "in flight by stage 5, 3; idle" in "\n".join(lines)


def test_models_on_one_base_hold_adapters_and_a_head():
    lora = [*PPO, "model.lora.rank=2", "model.lora.targets=[o_proj]", "critic.share_base=true"]
    lora += ["reward.source=runs/none", "reward.share_base=true"]
    lines, problems = dry_run(load_config(None, lora), "ppo", 4)
    assert problems == []
    # Two layers of a stage: A has 2 rows of half the 128 inputs, B 2 columns. The head has 128.
    own = 2 * (2 * 64 + 2 * 128)
    for role in ("critic", "reward"):
        assert f"{role}: parameters of a rank by stage {own}, {own + 128}" in lines
    assert f"critic: elements in its data-parallel buckets by stage {own}, {own + 128}" in lines


@pytest.mark.parametrize(("options", "replicas"), [([], 4), (["rollout.ranks=4"], 2)])
def test_a_vllm_engine_is_planned_and_not_started(options, replicas):
    """Pages of 128 tokens: 3 for each sequence of 80 + 200 tokens, and one more."""
    sizes = ["data.max_prompt_tokens=80", "rollout.max_response_tokens=200"]
    heads = ["model.num_attention_heads=4", "model.num_query_groups=2", "model.head_dim=32"]
    config = load_config(None, [*PPO, *sizes, *heads, *options, "rollout.engine=vllm"])
    lines, problems = dry_run(config, "ppo", 8)
    assert problems == []
    pages = config.rollout.batch_size // replicas * 3 + 1
    found = 4 * 2 * 32 * pages * 128 * 2  # 4 layers, keys and values, one head, bfloat16
    assert f"rollout: bytes of kv cache of a rank {found:,}" in lines


@st.composite
def settings_with_rollout_ranks(draw):
    """Small models of every kind, trained and generating at layouts of their own."""

    def choose(*values):
        return draw(st.sampled_from(values))

    tensor, pipeline, data = choose(1, 2), choose(1, 2), choose(1, 2)
    own_tensor, own_pipeline, replicas = choose(1, 2, 4), choose(1, 2, 4), choose(1, 3)
    experts = choose(False, True)
    ranks = own_tensor * own_pipeline * replicas
    return tensor * pipeline * data + ranks, [
        f"parallel.tensor_size={tensor}",
        f"parallel.pipeline_size={pipeline}",
        f"parallel.virtual_pipeline_size={choose(1, 2) if pipeline > 1 and own_pipeline > 1 else 1}",
        f"parallel.sequence_parallel={tensor > 1 and (experts or choose(False, True))}",
        *(["model.num_experts=4", "model.expert_ffn_hidden_size=12"] if experts else []),
        f"model.tied_embeddings={choose(False, True)}",
        f"model.num_query_groups={choose(2, 4)}",
        "model.num_layers=8",
        f"rollout.ranks={ranks}",
        f"rollout.tensor_size={own_tensor}",
        f"rollout.pipeline_size={own_pipeline}",
        f"rollout.slots={choose(1, 5, 64)}",
        f"rollout.staleness={choose(0, 1)}",
        "ppo.tis_cap=2",
    ]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(settings_with_rollout_ranks())
def test_ranks_that_only_generate_are_as_planned(case):
    world, overrides = case
    config = load_config(None, [*TOY, *overrides])
    lines, problems = dry_run(config, "ppo", world)
    assert problems == []
    ranks = config.rollout.ranks
    assert f"on {world - ranks} ranks: " in lines[0]
    assert f" and {ranks} ranks: " in lines[0]
    assert "that only generate; " in lines[0]


def test_a_rank_that_only_generates_by_hand():
    """Two layers of hidden size 8 with one group of 4 wide heads, and a vocabulary of 112 rows.

    A layer: queries, keys and values (8 + 2 * 4) * 8, output 8 * 8, gate and up and down 3 * 8 * 16,
    two norms of 8. The cache: keys and values of 32 sequences of 96 tokens in two bytes, 2 * 2 * 32 * 96 * 4 * 2.
    """
    shape = {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 16}
    model = [f"model.{key}={value}" for key, value in shape.items()]
    heads = ["model.num_attention_heads=2", "model.num_query_groups=1", "model.head_dim=4"]
    sizes = ["rollout.batch_size=64", "rollout.max_response_tokens=64", "data.max_prompt_tokens=32"]
    overrides = [*TOY, *model, *heads, *sizes, "parallel.tensor_size=2", "rollout.tensor_size=1"]
    lines, problems = dry_run(load_config(None, [*overrides, "rollout.ranks=2"]), "ppo", 6)
    assert problems == []
    size = 2 * (16 * 8 + 8 * 8 + 3 * 8 * 16 + 2 * 8) + 2 * 112 * 8 + 8
    assert f"rollout: parameters of a rank by stage {size:,}" in lines
    assert "rollout: bytes of kv cache of a rank 98,304" in lines
    assert "4 ranks: TP2 x PP1 x DP2 (gloo, cpu) and 2 ranks: TP1 x PP1 x DP2" in lines[0]
    assert "3 distinct ranks" in lines[0]


def test_sizes_that_do_not_fit_are_refused_without_data(capsys):
    arguments = ["ppo", *PPO, "ppo.minibatch_size=30", "--dry-run", "--world-size", "16"]
    assert main(arguments) == 2
    (line, _) = capsys.readouterr().err.splitlines()
    assert (
        line
        == "ppo.minibatch_size=30: must be a multiple of the data-parallel size 4. Use 28 or 32."
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--world-size", "0"], "--world-size=0: must be above 0. Give a positive number."),
        (["--world-size", "6"], "parallel: tensor_size * pipeline_size * context_size = 4 must"),
        (["--world-size", "4", "ppo.kl_coef=-1"], "ppo.kl_coef=-1: input should be"),
        (["--world-size", "4", "model.max_positions=9"], "rollout.max_response_tokens: with"),
        (["--world-size", "4", "rollout.ranks=4"], "rollout.ranks=4: must leave ranks that train"),
        (["--world-size", "8", "rollout.ranks=2"], "parallel: tensor_size * pipeline_size * "),
        (["--world-size", "4", "rollout.staleness=1"], "rollout.staleness=1: needs rollout.ranks"),
    ],
)
def test_what_a_start_would_refuse_is_refused(arguments, line, capsys):
    assert main(["ppo", "--dry-run", *arguments, *PPO]) == 2
    assert capsys.readouterr().err.startswith(line)


def test_what_is_not_as_planned_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(module, "count", lambda chunks: 1)
    arguments = ["ppo", *PPO, "--dry-run", "--world-size", "4"]
    assert main(arguments) == 1
    *_, first, last = capsys.readouterr().out.partition("policy, rank 0: parameters: ")
    assert re.match(r"built [\d,]+, planned 1\n", last), first
    assert last.endswith("\nfails\n")
