"""Rules about the layout, the job and the world; every message, and the cases just inside."""

import os
import subprocess

import pytest

from marlhf_mega.config.checks import check_folder, check_job, check_world
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config

MODEL = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "max_positions": 100,
}


def make(**sections):
    return Config.model_validate({"model": MODEL | sections.pop("model", {}), **sections})


def world_problems(world_size, *, num_rollout_ranks=0, **sections):
    with pytest.raises(ConfigError) as error:
        check_world(make(**sections), world_size, num_rollout_ranks=num_rollout_ranks)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("parallel", "world_size", "data_size"),
    [
        ({}, 1, 1),
        ({}, 4, 4),
        ({"tensor_size": 2}, 4, 2),
        # Two key/value heads on four ranks: each is on two of them.
        ({"tensor_size": 4}, 4, 1),
        ({"tensor_size": 2, "pipeline_size": 2, "sequence_parallel": True}, 8, 2),
        ({"pipeline_size": 2, "virtual_pipeline_size": 2}, 2, 1),
    ],
)
def test_a_layout_that_fits_gives_the_data_parallel_size(parallel, world_size, data_size):
    assert check_world(make(parallel=parallel), world_size) == data_size


def test_experts_that_fit():
    parallel = {"tensor_size": 2, "sequence_parallel": True, "expert_size": 4}
    assert check_world(make(parallel=parallel, model={"num_experts": 4}), 4) == 2


@pytest.mark.parametrize(
    ("parallel", "model", "world_size", "expected"),
    [
        (
            {"tensor_size": 2},
            {},
            3,
            "parallel: tensor_size * pipeline_size * context_size = 2 must divide the number of "
            "ranks; it is 3. Start a multiple of 2 ranks.",
        ),
        (
            {"expert_size": 4},
            {"num_experts": 4},
            2,
            "parallel.expert_size=4: must divide the ranks of one pipeline stage, 2. Lower it or "
            "start more ranks.",
        ),
        (
            {"context_size": 2},
            {},
            3,
            "parallel: tensor_size * pipeline_size * context_size = 2 must divide the number of "
            "ranks; it is 3. Start a multiple of 2 ranks.",
        ),
        (
            {"tensor_size": 8},
            {},
            8,
            "parallel.tensor_size=8: must divide model.num_attention_heads=4. Use 1, 2 or 4.",
        ),
        (
            {"tensor_size": 4},
            {"num_attention_heads": 12, "num_query_groups": 6, "head_dim": 4},
            4,
            "parallel.tensor_size=4: must divide model.num_query_groups=6 or be a multiple of it. "
            "Use 1, 2, 3 or 6.",
        ),
        (
            # As Qwen2.5 1.5B: (12 + 2 * 2) * 128 rows.
            {"tensor_size": 6},
            {
                "num_attention_heads": 12,
                "num_query_groups": 2,
                "head_dim": 128,
                "ffn_hidden_size": 96,
            },
            6,
            "parallel.tensor_size=6: more ranks than model.num_query_groups=2 must divide the 2048 "
            "rows of queries, keys and values together. Use 1 or 2.",
        ),
        (
            {"tensor_size": 2},
            {"ffn_hidden_size": 33},
            2,
            "parallel.tensor_size=2: must divide model.ffn_hidden_size=33. Use another size.",
        ),
        (
            {"tensor_size": 2, "sequence_parallel": True},
            {"num_experts": 4, "shared_expert_ffn_hidden_size": 33},
            2,
            "parallel.tensor_size=2: must divide model.shared_expert_ffn_hidden_size=33. "
            "Use another size.",
        ),
        (
            {"pipeline_size": 4, "virtual_pipeline_size": 2},
            {},
            4,
            "parallel.pipeline_size=4 times virtual_pipeline_size=2: must divide "
            "model.num_layers=4. Change one of them to make the product 1, 2 or 4.",
        ),
        (
            {"virtual_pipeline_size": 2},
            {},
            1,
            "parallel.virtual_pipeline_size=2: needs parallel.pipeline_size > 1; it is 1. "
            "Set it to 1.",
        ),
        (
            {"expert_size": 2},
            {},
            2,
            "parallel.expert_size=2: the model has no experts. Set it to 1.",
        ),
        (
            {"expert_size": 2},
            {"num_experts": 5},
            2,
            "parallel.expert_size=2: must divide model.num_experts=5. Use 1 or 5.",
        ),
        (
            {"tensor_size": 2},
            {"num_experts": 4},
            2,
            "parallel.sequence_parallel=false: experts with parallel.tensor_size > 1 need it. "
            "Set it to true.",
        ),
    ],
)
def test_a_layout_that_does_not_fit_says_what_would(parallel, model, world_size, expected):
    assert world_problems(world_size, parallel=parallel, model=model) == [expected]


@pytest.mark.parametrize(
    ("rollout", "model", "expected"),
    [
        (
            {"tensor_size": 1, "pipeline_size": 3},
            {"num_layers": 6},
            "rollout: tensor_size * pipeline_size * context_size = 3 must divide the number of "
            "ranks; it is 4. Start a multiple of 3 ranks.",
        ),
        (
            {"pipeline_size": 1, "tensor_size": 4},
            {"num_attention_heads": 6, "num_query_groups": 2, "head_dim": 4},
            "rollout.tensor_size=4: must divide model.num_attention_heads=6. Use 1, 2, 3 or 6.",
        ),
        (
            {"pipeline_size": 4, "tensor_size": 1},
            {"num_layers": 6},
            "rollout.pipeline_size=4 times virtual_pipeline_size=1: must divide "
            "model.num_layers=6. Change one of them to make the product 1, 2, 3 or 6.",
        ),
    ],
)
def test_a_rollout_layout_that_does_not_fit_says_what_would(rollout, model, expected):
    parallel = {"tensor_size": 2, "pipeline_size": 2}
    assert world_problems(4, parallel=parallel, model=model, rollout=rollout) == [expected]


def test_the_rollout_has_the_training_layout_by_default():
    parallel = {"tensor_size": 2, "pipeline_size": 2, "virtual_pipeline_size": 2}
    config = make(parallel=parallel, rollout={"tensor_size": 2})
    assert config.rollout_parallel == config.parallel
    own = make(parallel=parallel, rollout={"pipeline_size": 1}).rollout_parallel
    assert (own.tensor_size, own.pipeline_size, own.virtual_pipeline_size) == (2, 1, 1)
    assert not own.sequence_parallel
    experts = make(parallel=parallel, rollout={"pipeline_size": 1}, model={"num_experts": 4})
    assert experts.rollout_parallel.sequence_parallel


def test_all_broken_rules_are_named_at_once():
    lines = world_problems(
        2, parallel={"tensor_size": 3}, model={"ffn_hidden_size": 64, "num_query_groups": 4}
    )
    assert [line.split(":")[0] for line in lines] == [
        "parallel",
        "parallel.tensor_size=3",
        "parallel.tensor_size=3",
    ]


@pytest.fixture
def job_problems(tmp_path):
    """Problems of a job whose data files exist, by default."""
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")

    def check(job, data_size=1, **sections):
        files = {"train_path": str(data), "validation_path": str(data)}
        sections["data"] = files | {"max_prompt_tokens": 40} | sections.get("data", {})
        defaults = {
            "rollout": {"max_response_tokens": 60},
            "reward": {"source": "module:rule"},
        }
        for name, values in defaults.items():
            sections[name] = values | sections.get(name, {})
        sections["data"].setdefault("max_response_tokens", 60)
        try:
            check_job(make(**sections), job, data_size)
        except ConfigError as error:
            return str(error).splitlines()
        return []

    return check


@pytest.mark.parametrize(
    "job", ["sft", "reward", "preference", "ppo", "offline", "evaluate", "generate"]
)
def test_a_job_that_has_all_it_needs(job_problems, job):
    # 40 prompt tokens and 60 response tokens are just the model's 100 positions.
    assert job_problems(job, data_size=4) == []


@pytest.mark.parametrize("job", ["sft", "reward", "preference", "ppo"])
def test_training_needs_training_data_and_no_validation_data(job_problems, job):
    nothing = {"train_path": None, "validation_path": None}
    assert job_problems(job, data=nothing) == [
        f"data.train_path: {job} needs it; it is not set. Give a .jsonl or .parquet file."
    ]


def test_evaluation_needs_validation_data_only(job_problems):
    nothing = {"train_path": None, "validation_path": None}
    assert job_problems("evaluate", data=nothing) == [
        "data.validation_path: evaluate needs it; it is not set. Give a .jsonl or .parquet file."
    ]


def test_a_comparison_needs_a_judge(job_problems):
    other, nobody = {"against": "runs/sft"}, {"source": []}
    assert job_problems("evaluate", evaluate=other, reward=nobody) == [
        "evaluate.against=runs/sft: needs a judge of the answers; reward.source and evaluate.gold "
        "are not set. Set one of them."
    ]
    gold = other | {"gold": "module:rule"}
    assert job_problems("evaluate", evaluate=gold, reward=nobody) == []
    assert job_problems("evaluate", evaluate=other) == []


@pytest.mark.parametrize("key", ["train_path", "validation_path"])
def test_a_data_file_must_exist(job_problems, key, tmp_path):
    missing = tmp_path / "gone.jsonl"
    assert job_problems("sft", data={key: str(missing)}) == [
        f"data.{key}={missing}: no such file. Give a .jsonl or .parquet file."
    ]


def test_weights_are_refused_where_they_do_nothing(job_problems, tmp_path):
    weighted = [{"path": str(tmp_path / "rows.jsonl"), "weight": 0.5}]
    assert job_problems("sft", data={"train_path": weighted}) == []
    assert job_problems("sft", data={"validation_path": weighted}) == [
        f"data.validation_path={tmp_path / 'rows.jsonl'}: is judged once, whole; its weight is "
        "0.5. Remove the weight."
    ]
    assert job_problems("offline", data={"train_path": weighted}) == [
        "offline.sampling=good_priority: draws responses by their advantage, not by the weights of "
        "data.train_path. Remove these, or use offline.sampling=all."
    ]


@pytest.mark.parametrize(
    ("job", "section"),
    [
        ("sft", "data"),
        ("reward", "data"),
        ("preference", "data"),
        ("ppo", "rollout"),
        ("offline", "rollout"),
        ("offline", "data"),
        ("generate", "rollout"),
    ],
)
def test_prompt_and_response_must_fit_in_the_positions(job_problems, job, section):
    assert job_problems(job, **{section: {"max_response_tokens": 61}}) == [
        f"{section}.max_response_tokens: with data.max_prompt_tokens=40 it must fit in "
        "model.max_positions=100; the sum is 101. Lower one of them."
    ]


@pytest.mark.parametrize(
    ("job", "section", "key"),
    [
        ("sft", "sft", "batch_size"),
        ("reward", "reward_model", "batch_size"),
        ("preference", "preference", "batch_size"),
        ("offline", "offline", "batch_size"),
    ],
)
def test_a_batch_is_a_multiple_of_the_data_parallel_size(job_problems, job, section, key):
    assert job_problems(job, data_size=4, **{section: {key: 10}}) == [
        f"{section}.{key}=10: must be a multiple of the data-parallel size 4. Use 8 or 12."
    ]


def test_a_batch_smaller_than_the_data_parallel_size(job_problems):
    assert job_problems("sft", data_size=4, sft={"batch_size": 3}) == [
        "sft.batch_size=3: must be a multiple of the data-parallel size 4. Use 4."
    ]


def test_rollouts_and_minibatches_are_multiples_of_the_data_parallel_size(job_problems):
    lines = job_problems("ppo", data_size=4, rollout={"batch_size": 6}, ppo={"minibatch_size": 6})
    assert lines == [
        "rollout.batch_size=6: must be a multiple of the data-parallel size 4. Use 4 or 8.",
        "ppo.minibatch_size=6: must be a multiple of the data-parallel size 4. Use 4 or 8.",
    ]


def test_an_interleaved_pipeline_needs_a_microbatch_for_every_stage(job_problems):
    parallel = {"pipeline_size": 2, "virtual_pipeline_size": 2}
    assert job_problems("sft", parallel=parallel, sft={"batch_size": 2}) == []
    assert job_problems("sft", parallel=parallel, sft={"batch_size": 1}) == [
        "sft.batch_size=1: an interleaved pipeline of 2 stages needs at least 2. Raise it or set "
        "parallel.virtual_pipeline_size=1."
    ]


def test_pairs_are_enough_for_the_microbatches_of_an_interleaved_pipeline(job_problems):
    parallel = {"pipeline_size": 2, "virtual_pipeline_size": 2}
    even, large = {"batch_size": 4, "microbatch_size": 1}, {"batch_size": 3, "microbatch_size": 2}
    for fits in (even, large):
        assert job_problems("reward", parallel=parallel, reward_model=fits) == []
    odd = {"batch_size": 3, "microbatch_size": 1}
    assert job_problems("reward", parallel=parallel, reward_model=odd) == [
        "reward_model.microbatch_size=1: splits the 3 pairs of a rank into 3 microbatches; an "
        "interleaved pipeline needs a multiple of its 2 stages. Raise it, or make "
        "reward_model.batch_size a multiple of 2."
    ]


@pytest.mark.parametrize("job", ["evaluate", "generate"])
def test_evaluation_and_generation_do_not_overwrite_a_training_run(job_problems, job, tmp_path):
    run = {"dir": str(tmp_path / "run")}
    assert job_problems(job, run=run) == []
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert job_problems("ppo", run=run) == []
    assert job_problems(job, run=run) == [
        f"run.dir={tmp_path}/run: contains a training run, whose config.yaml and samples {job} "
        "would overwrite. Use another folder."
    ]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"reward": {"source": []}},
            "reward.source: ppo needs a reward; it is not set. Give the directory of a reward model "
            "or a code reward module:function.",
        ),
        (
            {"rollout": {"temperature": 0}},
            "rollout.temperature=0.0: ppo needs random samples. Use a value above 0, such as 1.",
        ),
        (
            {"rollout": {"batch_size": 12}, "ppo": {"minibatch_size": 8}},
            "ppo.minibatch_size=8: must divide rollout.batch_size=12. Use 1, 2, 3, 4, 6 or 12.",
        ),
        (
            {
                "rollout": {"batch_size": 12, "samples_per_prompt": 3, "filter": "best_worst"},
                "ppo": {"minibatch_size": 12},
            },
            "ppo.minibatch_size=12: must divide rollout.batch_size=12, of which rollout.filter "
            "leaves 8. Use 1, 2, 4 or 8.",
        ),
    ],
)
def test_what_only_ppo_needs(job_problems, sections, expected):
    assert job_problems("ppo", **sections) == [expected]
    assert job_problems("evaluate", **sections) == []


def test_advantages_need_values_of_prompts(job_problems):
    lines = job_problems("offline", reward={"source": []}, data={"validation_path": None})
    assert lines == [
        "reward.source: offline.algorithm=a_lol with offline.sampling=good_priority needs the "
        "values of prompts, which are learned from scored responses; it is not set. Give the "
        "directory of a reward model or a code reward module:function.",
        "data.validation_path: offline.algorithm=a_lol with offline.sampling=good_priority needs "
        "the values of prompts, which are learned from responses to its prompts; it is not set. "
        "Give a file of prompts.",
    ]
    likelihood = {"algorithm": "nll", "sampling": "all"}
    assert job_problems("offline", offline=likelihood, reward={"source": []}) == []


@pytest.mark.parametrize("job", ["ppo", "evaluate", "generate"])
def test_a_token_budget_holds_the_longest_sequence(job_problems, job):
    assert job_problems(job, ppo={"microbatch_tokens": 100}) == []
    assert job_problems(job, ppo={"microbatch_tokens": 99}) == [
        "ppo.microbatch_tokens=99: must fit the longest sequence, data.max_prompt_tokens + "
        "rollout.max_response_tokens = 100 with padding. Use at least 100."
    ]
    parallel = {"tensor_size": 4, "sequence_parallel": True}
    data = {"max_prompt_tokens": 38}
    found = job_problems(job, ppo={"microbatch_tokens": 99}, parallel=parallel, data=data)
    assert [line.split(":")[0] for line in found] == ["ppo.microbatch_tokens=99"]
    # Packed sequences are not padded one by one.
    packed = {"microbatch_tokens": 98, "packing": True}
    assert job_problems(job, ppo=packed, parallel=parallel, data=data) == []
    # Two pieces for each of the ranks that share a sequence, packed or not.
    context = {"context_size": 4}
    assert job_problems(job, ppo={"microbatch_tokens": 103}, parallel=context) == [
        "ppo.microbatch_tokens=103: must fit the longest sequence, data.max_prompt_tokens + "
        "rollout.max_response_tokens = 104 with padding. Use at least 104."
    ]
    assert len(job_problems(job, ppo=packed, parallel=context)) == 1
    assert (
        job_problems(job, ppo={"microbatch_tokens": 104, "packing": True}, parallel=context) == []
    )
    assert job_problems(job, ppo=packed) == [
        "ppo.microbatch_tokens=98: must fit the longest sequence, data.max_prompt_tokens + "
        "rollout.max_response_tokens = 100. Use at least 100."
    ]


@pytest.mark.parametrize(
    ("memory", "line"),
    [
        (
            {"recompute_num_layers": 1},
            "memory.recompute_num_layers=1: needs memory.recompute=full; it is none. Remove it or "
            "set memory.recompute=full.",
        ),
        (
            {"recompute": "full", "recompute_num_layers": 3},
            "memory.recompute_num_layers=3: must not exceed the 2 layers of a stage's chunk. Lower "
            "it, or remove it to recompute all of them.",
        ),
    ],
)
def test_recompute_fits_the_layers_of_a_chunk(memory, line):
    assert world_problems(2, memory=memory, parallel={"pipeline_size": 2}) == [line]


def test_recompute_may_cover_every_layer_of_a_chunk():
    memory = {"recompute": "full", "recompute_num_layers": 2}
    assert check_world(make(memory=memory, parallel={"pipeline_size": 2}), 2) == 1


@pytest.mark.parametrize(
    ("precision", "model", "line"),
    [
        (
            {"dtype": "float32"},
            {},
            "precision.dtype=float32: FP8 needs bfloat16 for all else. Set it to bfloat16, or "
            "precision.fp8=off.",
        ),
        (
            {},
            {"attention_softcap": 50.0},
            "precision.fp8=hybrid: Transformer Engine supports neither softcaps nor post norms; "
            "model.architecture=llama has them. Set it to off.",
        ),
        (
            {"attention_backend": "flash", "fp8": "off"},
            {"attention_softcap": 50.0},
            "precision.attention_backend=flash: chooses a kernel of Transformer Engine, which "
            "supports neither softcaps nor post norms; model.architecture=llama has them. Set it "
            "to auto.",
        ),
        (
            {"fp8_recipe": "delayed", "fp8_edge_layers_bf16": 1},
            {},
            "precision.fp8_edge_layers_bf16=1: delayed scaling always covers all layers. Set it "
            "to 0, or use another precision.fp8_recipe.",
        ),
        (
            {"fp8_edge_layers_bf16": 3},
            {},
            "precision.fp8_edge_layers_bf16=3: must not exceed the 2 layers of a pipeline stage. "
            "Lower it.",
        ),
        (
            {"fp8_recipe": "mxfp8"},
            {"ffn_hidden_size": 96, "head_dim": 32},
            "model.ffn_hidden_size: precision.fp8_recipe=mxfp8 needs a multiple of 32 on every "
            "rank; parallel.tensor_size=2 leaves 48. Use another recipe or layout, or "
            "precision.fp8=off.",
        ),
        (
            {},
            {"head_dim": 8},
            "model.num_query_groups * head size: precision.fp8_recipe=tensorwise needs a multiple "
            "of 16 on every rank; parallel.tensor_size=2 leaves 8. Use another recipe or layout, "
            "or precision.fp8=off.",
        ),
    ],
)
def test_fp8_suits_the_model(precision, model, line):
    parallel = {"tensor_size": 2, "pipeline_size": 2}
    problems = world_problems(
        4,
        precision={"fp8": "hybrid"} | precision,
        model={"hidden_size": 64} | model,
        parallel=parallel,
    )
    assert problems == [line]


@pytest.mark.parametrize(
    ("rollout", "num_rollout_ranks"), [({"tensor_size": 2}, 0), ({"ranks": 1}, 1)]
)
def test_fp8_weights_stay_in_the_training_layout(rollout, num_rollout_ranks):
    problems = world_problems(
        2,
        num_rollout_ranks=num_rollout_ranks,
        precision={"fp8": "hybrid", "fp8_param_gather": True},
        model={"hidden_size": 64},
        rollout=rollout,
    )
    assert problems == [
        "precision.fp8_param_gather=true: FP8 weights cannot be resharded for generation. Set it "
        "to false, or remove rollout.ranks, rollout.engine, rollout.tensor_size and "
        "rollout.pipeline_size."
    ]


def test_mxfp8_weights_are_not_gathered_during_passes():
    settings = {
        "precision": {"fp8": "hybrid", "fp8_recipe": "mxfp8", "fp8_param_gather": True},
        "parallel": {"overlap": True},
        "model": {"hidden_size": 128},
    }
    assert world_problems(2, **settings) == [
        "parallel.overlap=true: mxfp8 weights are gathered in the gradients' memory, which the "
        "next step needs. Set it to false, or precision.fp8_param_gather=false."
    ]
    settings["precision"]["fp8_recipe"] = "tensorwise"
    assert check_world(make(**settings), 2) == 2


@pytest.mark.parametrize(
    ("sections", "rest"),
    [
        (
            {"model": {"num_experts": 4}},
            "experts, whose tokens the CPU counts; model.num_experts=4. Set it to false.",
        ),
        (
            {"model": {"hidden_size": 64}, "precision": {"fp8": "hybrid"}},
            "FP8, whose scales the CPU manages; precision.fp8=hybrid. Set it to false.",
        ),
    ],
)
def test_cuda_graphs_need_no_cpu_inside(sections, rest):
    problems = world_problems(1, rollout={"cuda_graphs": True}, **sections)
    assert problems == [f"rollout.cuda_graphs=true: does not work with {rest}"]


def test_ranks_that_only_generate_leave_the_others_to_train():
    layout = {"parallel": {"tensor_size": 2}, "rollout": {"ranks": 3, "tensor_size": 1}}
    assert check_world(make(**layout), 7, num_rollout_ranks=3) == 2
    assert world_problems(3, num_rollout_ranks=3, **layout) == [
        "rollout.ranks=3: must leave ranks that train; 3 are started. Lower it or start more ranks."
    ]
    assert world_problems(6, num_rollout_ranks=3, **layout)[0].startswith(
        "parallel: tensor_size * pipeline"
    )
    both = {"parallel": {"tensor_size": 2}, "rollout": {"ranks": 3}}
    assert world_problems(7, num_rollout_ranks=3, **both) == [
        "rollout: tensor_size * pipeline_size * context_size = 2 must divide the number of ranks; "
        "it is 3. Start a multiple of 2 ranks."
    ]


def test_stale_samples_need_other_ranks_and_a_correction(job_problems):
    stale = {"staleness": 1, "ranks": 1}
    assert job_problems("ppo", rollout=stale, ppo={"tis_cap": 2}) == []
    assert job_problems("ppo", rollout=stale, ppo={"old_logprobs": "sampler"}) == []
    assert job_problems("ppo", rollout=stale) == [
        "rollout.staleness=1: samples from older weights need the correction ppo.tis_cap; it is "
        "not set. Set it to 2, for example, or ppo.old_logprobs=sampler."
    ]
    assert job_problems("ppo", rollout={"staleness": 1}, ppo={"tis_cap": 2}) == [
        "rollout.staleness=1: needs rollout.ranks > 0, for generation and training to overlap; it "
        "is 0. Set rollout.ranks, or rollout.staleness=0."
    ]


def test_ranks_that_only_generate_cannot_leave_fp8(job_problems):
    precision = {"fp8": "hybrid", "fp8_on_divergence": "leave"}
    assert job_problems("ppo", rollout={"ranks": 1}, precision=precision) == [
        "precision.fp8_on_divergence=leave: ranks that only generate would stay in FP8; "
        "rollout.ranks=1. Set it to warn, or rollout.ranks=0."
    ]


@pytest.mark.parametrize("key", ["offload_idle", "offload_optimizer"])
def test_only_idle_models_are_offloaded(job_problems, key):
    memory = {key: True}
    assert job_problems("ppo", memory=memory) == []
    assert job_problems("sft", memory=memory) == [
        f"memory.{key}=true: only ppo has phases with idle models; this is sft. Set it to false."
    ]
    precision = {"fp8": "hybrid", "fp8_param_gather": True}
    assert job_problems("ppo", memory=memory, precision=precision) == [
        f"memory.{key}=true: FP8 weights cannot be offloaded. Set it to false, or "
        "precision.fp8_param_gather=false."
    ]


def test_the_loss_of_a_router_needs_a_mean_over_tokens(job_problems):
    model = {"num_experts": 4, "router_aux_loss_coef": 0.01}
    assert job_problems("sft", model=model) == job_problems("ppo", model=model) == []
    rule = "model.router_aux_loss_coef=0.01: needs a loss that is a mean over tokens; "
    assert job_problems("reward", model=model) == [
        rule + "that of reward is one over pairs. Set it to 0."
    ]
    assert job_problems("ppo", model=model, ppo={"aggregation": "macro_mean"}) == [
        rule + "that of ppo has ppo.aggregation=macro_mean. Set it to 0."
    ]


def test_adapters_that_a_model_or_a_job_cannot_have_are_named(job_problems):
    experts = {"num_experts": 4, "architecture": "mixtral"}
    on = {"rank": 4}
    assert job_problems("sft", model={"lora": on}) == []
    assert job_problems("sft", model=experts | {"lora": on | {"targets": ["q_proj"]}}) == []
    assert job_problems(
        "sft", model=experts | {"lora": on | {"targets": ["q_proj", "up_proj"]}}
    ) == [
        "model.lora.targets=[q_proj,up_proj]: model.architecture=mixtral has experts, which get no "
        "adapters, instead of up_proj. Use [q_proj,k_proj,v_proj,o_proj] or some of these."
    ]
    assert len(job_problems("ppo", model=experts | {"lora": on})) == 1
    # Nothing is trained: a file may be shared with the job that does.
    assert job_problems("evaluate", model=experts | {"lora": on}) == []
    assert job_problems(
        "sft", model={"lora": on}, precision={"fp8": "hybrid", "fp8_param_gather": True}
    ) == [
        "model.lora.rank=4: adapters are trained, and not gathered in FP8; "
        "precision.fp8_param_gather=true. Set that to false."
    ]
    routed = experts | {"router_aux_loss_coef": 0.1, "lora": on | {"targets": ["q_proj"]}}
    assert job_problems("sft", model=routed) == [
        "model.router_aux_loss_coef=0.1: routers do not learn with model.lora.rank=4. Set it to 0."
    ]
    for job in ("ppo", "offline", "evaluate"):
        (problem,) = job_problems(job, model={"lora": on | {"path": "adapters"}})
        assert problem == (
            f"model.lora.path=adapters: {job} begins with a whole model. Merge the adapters into "
            "it with `python tools/convert_hf.py merge`, and remove the key."
        )


def test_a_shared_base_needs_weights_that_stay_and_models_that_may_share_it(job_problems):
    lora, shares = {"model": {"lora": {"rank": 4}}}, {"share_base": True}
    learned = {"reward": {"source": "rm"} | shares}
    assert job_problems("ppo", **lora, critic=shares, **learned) == []
    for job in ("sft", "evaluate"):
        assert job_problems(job, critic=shares, **learned) == []
    lines = job_problems("ppo", critic=shares, **learned)
    for key, line in zip(("critic", "reward"), lines, strict=True):
        assert line == (
            f"{key}.share_base=true: needs weights that stay as they are; model.lora.rank is not "
            "set, and all weights of the policy learn. Set it, or remove share_base."
        )
    lines = job_problems("ppo", **lora, critic=shares, ppo={"estimator": "rloo"})
    assert lines[0] == "critic.share_base=true: ppo.estimator=rloo has no critic. Set it to false."
    (line,) = job_problems("ppo", **lora, reward={"source": "a:b"} | shares)
    assert line == "reward.share_base=true: reward.source names no reward model. Set it to false."
    asked = {"source": "lm", "template": "{response}?", "answers": ["Yes", "No"]}
    (line,) = job_problems("ppo", **lora, reward={"source": asked} | shares)
    assert line == (
        "reward.source=lm: is a language model, and only reward models share the policy's base. "
        "Set reward.share_base=false, or leave it out."
    )
    online = {"preference": {"loss": "nash_md"}}
    for job, sections in (("offline", {}), ("preference", online)):
        line = "reward.share_base=true: only ppo shares a base; this is {}. Set it to false."
        assert line.format(job) in job_problems(job, **lora, **learned, **sections)


def test_a_run_directory_may_exist_or_be_created(tmp_path):
    check_folder(tmp_path, key="run.dir")
    check_folder(tmp_path / "a" / "b", key="run.dir")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "run", "a/b"])
def test_a_file_in_the_way_of_the_run_directory_is_named(tmp_path, below):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError) as error:
        check_folder(file / below, key="run.dir")
    assert str(error.value) == (
        f"run.dir={file / below}: must be a writable folder; {file} is not a folder. Use another "
        "folder."
    )


@pytest.fixture
def read_only(tmp_path):
    """Make a folder that this user, even if it is root, cannot write to."""
    folder = tmp_path / "read_only"
    folder.mkdir(mode=0o555)
    if os.geteuid() != 0:
        yield folder
        return
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("below", ["", "a/b"])
def test_a_run_directory_on_a_read_only_file_system_is_refused(read_only, below):
    with pytest.raises(ConfigError) as error:
        check_folder(read_only / below, key="run.dir")
    assert str(error.value) == (
        f"run.dir={read_only / below}: must be a writable folder; {read_only} is not writable. Use "
        "another folder."
    )


@pytest.mark.parametrize(
    ("job", "sections", "line"),
    [
        (
            "ppo",
            {"macro": {"rule": "token", "min_length": 2}},
            "macro.min_length=2: macro.rule=token makes actions of one token. Use "
            "macro.rule=fixed_ngram macro.n=2, or remove it.",
        ),
        (
            "ppo",
            {"macro": {"reward": "mean", "discount": "per_token"}, "ppo": {"gamma": 0.9}},
            "macro.discount=per_token: discounts the token rewards of an action, of which "
            "macro.reward=mean takes the mean. Use macro.reward=sum, or macro.discount=per_macro.",
        ),
        (
            "ppo",
            {"ppo": {"kl_target": 6.0, "kl_coef": 0.0}},
            "ppo.kl_target=6: the coefficient is adapted by factors; ppo.kl_coef=0 stays 0. Set "
            "ppo.kl_coef, or ppo.kl_target=null.",
        ),
        (
            "evaluate",
            {"evaluate": {"samples_per_prompt": 4, "temperature": 0}},
            "evaluate.samples_per_prompt=4: with evaluate.temperature=0 all responses to a prompt "
            "are the same. Set it to 1, or raise the temperature.",
        ),
        (
            "evaluate",
            {"evaluate": {"samples_per_prompt": 4, "best_of_n": True}, "reward": {"source": []}},
            "evaluate.best_of_n=true: takes the response with the highest score; reward.source is "
            "not set. Set it, or leave evaluate.best_of_n out.",
        ),
        (
            "reward",
            {"reward_model": {"length_coef": 0.5, "loss": "span"}},
            "reward_model.length_coef=0.5: correlates the scores of last tokens with the length; "
            "reward_model.loss=span compares those of all tokens. Use reward_model.loss=last, or "
            "set it to 0.",
        ),
        *(
            (
                "reward",
                {
                    "reward_model": {"latent_size": 8, **reward_model},
                    "checkpoint": {"export_hf": other == "checkpoint.export_hf=true"},
                },
                "reward_model.latent_size=8: scores last tokens by what a user prefers, as no "
                f"Hugging Face model does; not with {other}. Set it to 0, or change that key.",
            )
            for other, reward_model in {
                "reward_model.loss=span": {"loss": "span"},
                "reward_model.length_coef=0.5": {"length_coef": 0.5},
                "checkpoint.export_hf=true": {},
            }.items()
        ),
        (
            "offline",
            {"offline": {"algorithm": "a_lol_kl"}},
            "offline.kl_coef=0: offline.algorithm=a_lol_kl without it is a_lol. Set it, or use "
            "offline.algorithm=a_lol.",
        ),
        (
            "offline",
            {"offline": {"compat": "lol_rl"}},
            "offline.compat=lol_rl: changes only offline.sampling=all_priority, and "
            "offline.algorithm=a_lol_ref_free with offline.sampling=all. Remove it.",
        ),
        (
            "offline",
            {
                "offline": {"algorithm": "a_lol_macro"},
                "macro": {"rule": "token", "min_length": 2},
            },
            "macro.min_length=2: macro.rule=token makes actions of one token. Use "
            "macro.rule=fixed_ngram macro.n=2, or remove it.",
        ),
        (
            "offline",
            {"reward": {"source": "a:b", "dense": {"source": "dpo", "kind": "rto"}}},
            "reward.dense=[dpo]: shapes the scores of ppo; offline takes the rewards of its rows "
            "as they are. Remove it.",
        ),
        (
            "offline",
            {"reward": {"source": "a:b", "constraints": {"source": "c:d", "threshold": 1}}},
            "reward.constraints=[c:d]: shapes the scores of ppo; offline takes the rewards of its "
            "rows as they are. Remove it.",
        ),
        (
            "offline",
            {"reward": {"source": "module:rule", "shaping": ["z_score", "overlong"]}},
            "reward.shaping=[z_score,overlong]: shapes the scores of ppo; offline takes the "
            "rewards of its rows as they are. Remove it.",
        ),
        (
            "offline",
            {"reward": {"source": "module:rule", "normalize": "running"}},
            "reward.normalize=running: shapes the scores of ppo; offline takes the rewards of its "
            "rows as they are. Remove it.",
        ),
    ],
)
def test_a_key_that_would_change_nothing_is_refused(job_problems, job, sections, line):
    assert job_problems(job, **sections) == [line]
    assert job_problems("sft", **sections) == []
