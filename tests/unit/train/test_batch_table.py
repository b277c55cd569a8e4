"""Batch sizes worked by hand, and the words that say where they come from."""

import io
from types import SimpleNamespace

from rich.console import Console

from marlhf_mega.config.schema import Config
from marlhf_mega.train.batch_table import batches, show_batches


def rows(job, dp_size=1, *, world_size=None, pp_size=1, num_chunks=1, **sections):
    mesh = SimpleNamespace(
        dp_size=dp_size,
        world_size=world_size or dp_size,
        pp_size=pp_size,
        num_chunks=num_chunks,
    )
    found = batches(Config.model_validate(sections), job, mesh)
    return {what: (source, count) for what, source, count in found}


def test_a_ppo_step_by_hand():
    found = rows(
        "ppo",
        4,
        rollout={"batch_size": 96, "samples_per_prompt": 4},
        ppo={"epochs": 2, "minibatch_size": 48, "microbatch_size": 5},
    )
    assert {what: count for what, (_, count) in found.items()} == {
        "prompts per PPO step": "24",
        "sequences per PPO step": "96",
        "sequences decoded together": "24",
        "sequences per replica": "24",
        "optimizer steps per PPO step": "4",
        "microbatches per optimizer step": "3",  # 12 sequences: 5 + 5 + 2
    }


def test_what_a_filter_leaves_is_trained_on():
    rollout = {"batch_size": 96, "samples_per_prompt": 8, "filter": "best_worst"}
    found = rows("ppo", 4, rollout=rollout, ppo={"minibatch_size": 12})
    assert found["sequences trained on"] == ("best_worst", "24")
    assert found["sequences per replica"] == ("24 / 4 data-parallel", "6")
    assert found["optimizer steps per PPO step"] == ("1 epochs x 24 / minibatch 12", "2")
    assert "sequences trained on" not in rows("ppo", rollout=rollout | {"filter": "dynamic"})


def test_microbatches_of_tokens_are_as_many_as_the_lengths_make():
    ppo = {"microbatch_tokens": 4096, "packing": True}
    found = rows("ppo", 2, ppo=ppo)["microbatches per optimizer step"]
    assert found == ("up to 4,096 tokens each, packed", "by length")


def test_ranks_that_only_generate_decode_all_sequences():
    """Four of them at TP2 are two replicas with 32 sequences each, in slots of 24."""
    rollout = {"batch_size": 64, "ranks": 4, "tensor_size": 2, "slots": 24}
    found = rows("ppo", 2, world_size=2, rollout=rollout)
    assert found["sequences decoded together"] == ("4 rollout ranks: TP2 x PP1 x DP2", "24")
    assert found["sequences per replica"] == ("64 / 2 data-parallel", "32")


def test_a_layout_of_its_own_for_rollouts_is_shown():
    parallel, rollout = {"tensor_size": 4}, {"batch_size": 64, "tensor_size": 1}
    found = rows("ppo", 1, world_size=4, parallel=parallel, rollout=rollout)
    assert found["sequences decoded together"] == ("all ranks: TP1 x PP1 x DP4", "16")


def test_supervised_steps_by_hand():
    found = rows("sft", 2, sft={"batch_size": 32, "microbatch_size": 3, "packing": True})
    assert found == {
        "sequences per optimizer step": ("sft.batch_size", "32"),
        "sequences per replica": ("32 / 2 data-parallel", "16"),
        "microbatches per optimizer step": ("16 / microbatch 3, packed", "6"),
    }
    pairs = rows("reward", reward_model={"batch_size": 1024, "microbatch_size": 4})
    assert pairs["pairs per optimizer step"] == ("reward_model.batch_size", "1,024")
    assert pairs["microbatches per optimizer step"] == ("1,024 / microbatch 4, padded", "256")
    assert rows("offline")["responses per replica"] == ("64 / 1 data-parallel", "64")


def test_an_interleaved_pipeline_takes_a_multiple_of_its_stages():
    sft = {"batch_size": 20, "microbatch_size": 4}
    found = rows("sft", pp_size=4, num_chunks=2, sft=sft)
    assert found["microbatches per optimizer step"] == ("20 / microbatch 4, padded", "8")


def test_the_table_fits_80_columns():
    console = Console(file=io.StringIO(), width=80)
    rollout = {"batch_size": 4096, "ranks": 16, "slots": 512, "tensor_size": 8}
    mesh = SimpleNamespace(dp_size=64, world_size=512, pp_size=8, num_chunks=2)
    config = Config.model_validate({"rollout": rollout, "ppo": {"minibatch_size": 2048}})
    show_batches(batches(config, "ppo", mesh), console=console)
    lines = console.file.getvalue().splitlines()
    assert len([line for line in lines if line.strip()]) == 6
    assert "  1 epochs x 4,096 / minibatch 2,048  " in lines[5]
