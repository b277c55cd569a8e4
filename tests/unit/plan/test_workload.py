"""What a job does in a step, by hand."""

import pytest

from marlhf_mega.config.load import ConfigError, with_keys
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.generation import Generation
from marlhf_mega.plan.workload import workload
from tests.unit.plan.plans import PPO
from tests.unit.plan.shapes import LLAMA_8B


def test_packed_microbatches_by_hand():
    """Sequences of 511 + 1024 = 1535: 4000 tokens hold two, and 930 of a third."""
    ppo = PPO["ppo"] | {"minibatch_size": 256, "microbatch_tokens": 4000, "packing": True}
    config = Config.model_validate(PPO | {"data": {"max_prompt_tokens": 511}, "ppo": ppo})
    work = workload(config, "ppo", 128)
    batch = work.microbatch
    assert (batch.sequences, batch.seq, batch.tokens) == (2, 1535, 4000)
    assert batch.response_tokens == 2669  # 4000 * 1024 / 1535 = 2668.4
    assert batch.pairs == 2 * 1535**2 + 930**2
    assert work.num_microbatches == 32  # of 64 sequences on each of 4 replicas
    assert batch.describe() == "4000 packed"
    # Sequences are padded to the 8 ranks that share them, one by one unless packed.
    padded = workload(with_keys(config, {"ppo.packing": False}), "ppo", 128).microbatch
    assert (padded.sequences, padded.seq, padded.describe()) == (2, 1536, "2 x 1536")
    few = workload(with_keys(config, {"ppo.microbatch_tokens": 10**6}), "ppo", 128).microbatch
    assert (few.sequences, few.tokens, few.pairs) == (64, 64 * 1535, 64 * 1535**2)
    counted = workload(with_keys(config, {"ppo.microbatch_tokens": None}), "ppo", 128).microbatch
    assert (counted.sequences, counted.tokens) == (8, 8 * 1535)


def test_rows_on_gpus_are_packed_and_have_one_of_few_widths():
    """8 sequences of 511 + 1024 = 1535 are 12280 tokens in a row of 12288: 3/2 of 8192."""
    config = with_keys(Config.model_validate(PPO), {"data.max_prompt_tokens": 511})
    batch = workload(config, "ppo", 128, on_gpu=True).microbatch
    assert (batch.sequences, batch.seq, batch.filled, batch.tokens) == (8, 1535, 12280, 12288)
    assert batch.pairs == 8 * 1535**2 + 8**2
    assert batch.response_tokens == 8 * 1024
    assert workload(config, "ppo", 128).microbatch.describe() == "8 x 1536"
    # Padded rows: the next of 1280, 1536, 1792, 2048.
    longer = with_keys(config, {"data.max_prompt_tokens": 600, "ppo.packing": False})
    assert workload(longer, "ppo", 128, on_gpu=True).microbatch.describe() == "8 x 1792"
    # A budget is a width of its own.
    budget = with_keys(config, {"ppo.microbatch_tokens": 4000})
    batch = workload(budget, "ppo", 128, on_gpu=True).microbatch
    assert (batch.sequences, batch.filled, batch.tokens) == (2, 4000, 4000)


def test_scoring_microbatches_by_hand():
    config = with_keys(Config.model_validate(PPO), {"ppo.scoring_microbatch_factor": 3})
    work = workload(config, "ppo", 128)
    assert (work.microbatch.sequences, work.scoring.sequences) == (8, 24)
    packed = with_keys(config, {"ppo.microbatch_tokens": 4000, "ppo.packing": True})
    work = workload(packed, "ppo", 128)
    assert (work.microbatch.tokens, work.scoring.tokens) == (4000, 12000)
    many = with_keys(config, {"ppo.scoring_microbatch_factor": 100, "evaluate.num_prompts": 1024})
    assert workload(many, "ppo", 128).scoring.sequences == 64  # 256 samples on 4 replicas
    evaluated = with_keys(many, {"data.validation_path": "prompts.jsonl"})
    assert workload(evaluated, "ppo", 128).scoring.sequences == 256
    interleaved = with_keys(many, {"parallel.virtual_pipeline_size": 2})
    assert workload(interleaved, "ppo", 128).scoring.sequences == 16  # 4 stages want 4 microbatches
    other = workload(with_keys(config, {"sft.batch_size": 64}), "sft", 128)
    assert other.scoring == other.microbatch


@pytest.mark.parametrize(
    ("job", "sequences", "count"),
    [("sft", 8, 4), ("reward", 16, 8), ("preference", 16, 8), ("ppo", 8, 32)],
)
def test_microbatches_of_every_job(job, sequences, count):
    config = Config.model_validate(
        PPO | {"model": LLAMA_8B, "parallel": {}, "sft": {"batch_size": 32}}
    )
    work = workload(config, job, 1)
    assert (work.microbatch.sequences, work.num_microbatches) == (sequences, count)
    assert work.microbatch.seq == 512 + (1024 if job == "ppo" else 512)
    assert Generation.of_rollout(work).slots == 256


def test_a_job_that_answers_and_is_judged_is_planned_as_ppo():
    settings = {"preference": {"loss": "ipo_md"}, "model": LLAMA_8B}
    with pytest.raises(ConfigError, match=r"^preference\.loss=ipo_md: cannot be planned, since "):
        workload(Config.model_validate(settings), "preference", 8)
