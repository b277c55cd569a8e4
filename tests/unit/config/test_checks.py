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


def world_problems(world_size, *, apart=0, **sections):
    with pytest.raises(ConfigError) as error:
        check_world(make(**sections), world_size, apart=apart)
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("parallel", "world_size", "data_size"),
    [
        ({}, 1, 1),
        ({}, 4, 4),
        ({"tensor_size": 2}, 4, 2),
        # Two key/value heads on four ranks: every one is held twice.
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
            "parallel.tensor_size=6: more ranks than model.num_query_groups=2 cut queries, keys and "
            "values together, whose 2048 rows it must divide. Use 1 or 2.",
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
            "model.num_layers=4. Use a product among 1, 2 or 4.",
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
            "model.num_layers=6. Use a product among 1, 2, 3 or 6.",
        ),
    ],
)
def test_a_rollout_layout_that_does_not_fit_says_what_would(rollout, model, expected):
    parallel = {"tensor_size": 2, "pipeline_size": 2}
    assert world_problems(4, parallel=parallel, model=model, rollout=rollout) == [expected]


def test_the_rollout_has_the_training_layout_unless_told_otherwise():
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


@pytest.mark.parametrize("job", ["sft", "reward", "ppo", "offline", "evaluate", "generate"])
def test_a_job_that_has_all_it_needs(job_problems, job):
    # 40 prompt tokens and 60 response tokens are just the model's 100 positions.
    assert job_problems(job, data_size=4) == []


@pytest.mark.parametrize("job", ["sft", "reward", "ppo"])
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


@pytest.mark.parametrize("key", ["train_path", "validation_path"])
def test_a_data_file_must_exist(job_problems, key, tmp_path):
    missing = tmp_path / "gone.jsonl"
    assert job_problems("sft", data={key: str(missing)}) == [
        f"data.{key}={missing}: no such file. Give a .jsonl or .parquet file."
    ]


@pytest.mark.parametrize(
    ("job", "section"),
    [
        ("sft", "data"),
        ("reward", "data"),
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
        "reward_model.microbatch_size=1: cuts the 3 pairs of a rank to 3 microbatches; an "
        "interleaved pipeline needs a multiple of its 2 stages. Raise it, or make "
        "reward_model.batch_size a multiple of 2."
    ]


@pytest.mark.parametrize("job", ["evaluate", "generate"])
def test_what_does_not_train_leaves_the_folder_of_a_training_run_alone(job_problems, job, tmp_path):
    run = {"dir": str(tmp_path / "run")}
    assert job_problems(job, run=run) == []
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert job_problems("ppo", run=run) == []
    assert job_problems(job, run=run) == [
        f"run.dir={tmp_path}/run: holds a training run, whose config.yaml and samples {job} would "
        "replace. Name another folder."
    ]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            {"reward": {"source": []}},
            "reward.source: ppo needs a reward. Give a reward model's directory or a rule "
            "module:function.",
        ),
        (
            {"rollout": {"temperature": 0}},
            "rollout.temperature=0.0: ppo needs random samples. Use a value above 0, such as 1.",
        ),
        (
            {"rollout": {"batch_size": 12}, "ppo": {"minibatch_size": 8}},
            "ppo.minibatch_size=8: must divide rollout.batch_size=12. Use 1, 2, 3, 4, 6 or 12.",
        ),
    ],
)
def test_what_only_ppo_needs(job_problems, sections, expected):
    assert job_problems("ppo", **sections) == [expected]
    assert job_problems("evaluate", **sections) == []


def test_advantages_need_scored_prompts(job_problems):
    lines = job_problems("offline", reward={"source": []}, data={"validation_path": None})
    assert lines == [
        "reward.source: offline.algorithm=a_lol with offline.sampling=good_priority compares each "
        "reward with what the prompt is worth, which is learned from scored responses; it is not "
        "set. Give a reward model's directory or a rule module:function.",
        "data.validation_path: offline.algorithm=a_lol with offline.sampling=good_priority "
        "compares each reward with what the prompt is worth, which is learned from answers to "
        "these prompts; it is not set. Give a file of prompts.",
    ]
    likelihood = {"algorithm": "nll", "sampling": "all"}
    assert job_problems("offline", offline=likelihood, reward={"source": []}) == []


@pytest.mark.parametrize("job", ["ppo", "evaluate", "generate"])
def test_a_token_budget_holds_the_longest_sequence(job_problems, job):
    assert job_problems(job, ppo={"microbatch_tokens": 100}) == []
    assert job_problems(job, ppo={"microbatch_tokens": 99}) == [
        "ppo.microbatch_tokens=99: must hold the longest sequence, data.max_prompt_tokens + "
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
        "ppo.microbatch_tokens=103: must hold the longest sequence, data.max_prompt_tokens + "
        "rollout.max_response_tokens = 104 with padding. Use at least 104."
    ]
    assert len(job_problems(job, ppo=packed, parallel=context)) == 1
    assert (
        job_problems(job, ppo={"microbatch_tokens": 104, "packing": True}, parallel=context) == []
    )
    assert job_problems(job, ppo=packed) == [
        "ppo.microbatch_tokens=98: must hold the longest sequence, data.max_prompt_tokens + "
        "rollout.max_response_tokens = 100. Use at least 100."
    ]


@pytest.mark.parametrize(
    ("memory", "line"),
    [
        (
            {"recompute_num_layers": 1},
            "memory.recompute_num_layers=1: needs memory.recompute=full; it is none. Leave it out "
            "or set memory.recompute=full.",
        ),
        (
            {"recompute": "full", "recompute_num_layers": 3},
            "memory.recompute_num_layers=3: must not exceed the 2 layers of a stage's chunk. Lower "
            "it, or leave it out for all of them.",
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
            "precision.dtype=float32: FP8 needs bfloat16 beside it. Set it to bfloat16, or "
            "precision.fp8=off.",
        ),
        (
            {},
            {"attention_softcap": 50.0},
            "precision.fp8=hybrid: Transformer Engine has neither softcaps nor post norms; "
            "model.architecture=llama has. Set it to off.",
        ),
        (
            {"fp8_recipe": "delayed", "fp8_edge_layers_bf16": 1},
            {},
            "precision.fp8_edge_layers_bf16=1: delayed scaling covers all layers. Set it to 0, or "
            "another precision.fp8_recipe.",
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


@pytest.mark.parametrize(("rollout", "apart"), [({"tensor_size": 2}, 0), ({"ranks": 1}, 1)])
def test_weights_in_fp8_stay_at_the_training_layout(rollout, apart):
    problems = world_problems(
        2,
        apart=apart,
        precision={"fp8": "hybrid", "fp8_param_gather": True},
        model={"hidden_size": 64},
        rollout=rollout,
    )
    assert problems == [
        "precision.fp8_param_gather=true: weights in FP8 cannot move to ranks or a layout of the "
        "rollout's own. Set it to false, or leave out rollout.ranks, rollout.tensor_size and "
        "rollout.pipeline_size."
    ]


def test_weights_in_mxfp8_do_not_travel_beside_passes():
    settings = {
        "precision": {"fp8": "hybrid", "fp8_recipe": "mxfp8", "fp8_param_gather": True},
        "parallel": {"overlap": True},
        "model": {"hidden_size": 128},
    }
    assert world_problems(2, **settings) == [
        "parallel.overlap=true: weights in mxfp8 travel through the gradients' memory, which the "
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
            "FP8, whose scales the CPU minds; precision.fp8=hybrid. Set it to false.",
        ),
    ],
)
def test_cuda_graphs_hold_what_needs_no_cpu(sections, rest):
    problems = world_problems(1, rollout={"cuda_graphs": True}, **sections)
    assert problems == [f"rollout.cuda_graphs=true: cannot hold {rest}"]


def test_ranks_that_only_generate_leave_the_others_to_train():
    layout = {"parallel": {"tensor_size": 2}, "rollout": {"ranks": 3, "tensor_size": 1}}
    assert check_world(make(**layout), 7, apart=3) == 2
    assert world_problems(3, apart=3, **layout) == [
        "rollout.ranks=3: must leave ranks that train; 3 are started. Lower it or start more ranks."
    ]
    assert world_problems(6, apart=3, **layout)[0].startswith("parallel: tensor_size * pipeline")
    both = {"parallel": {"tensor_size": 2}, "rollout": {"ranks": 3}}
    assert world_problems(7, apart=3, **both) == [
        "rollout: tensor_size * pipeline_size * context_size = 2 must divide the number of ranks; "
        "it is 3. Start a multiple of 2 ranks."
    ]


def test_stale_samples_need_other_ranks_and_a_correction(job_problems):
    stale = {"staleness": 1, "ranks": 1}
    assert job_problems("ppo", rollout=stale, ppo={"sampler_cap": 2}) == []
    assert job_problems("ppo", rollout=stale, ppo={"old_logprobs": "sampler"}) == []
    assert job_problems("ppo", rollout=stale) == [
        "rollout.staleness=1: samples of older weights need ppo.sampler_cap; it is not set. Set it "
        "to 2, say, or ppo.old_logprobs=sampler."
    ]
    assert job_problems("ppo", rollout={"staleness": 1}, ppo={"sampler_cap": 2}) == [
        "rollout.staleness=1: needs rollout.ranks > 0, or nothing would overlap; it is 0. Set "
        "rollout.ranks, or rollout.staleness=0."
    ]


def test_ranks_that_only_generate_cannot_leave_fp8(job_problems):
    precision = {"fp8": "hybrid", "fp8_on_divergence": "leave"}
    assert job_problems("ppo", rollout={"ranks": 1}, precision=precision) == [
        "precision.fp8_on_divergence=leave: ranks that only generate would not leave FP8. Set it "
        "to warn, or rollout.ranks=0."
    ]


@pytest.mark.parametrize("key", ["offload_idle", "offload_optimizer"])
def test_only_models_that_rest_leave_the_device(job_problems, key):
    memory = {key: True}
    assert job_problems("ppo", memory=memory) == []
    assert job_problems("sft", memory=memory) == [
        f"memory.{key}=true: only ppo has phases in which models rest; this is sft. Set it to "
        "false."
    ]
    precision = {"fp8": "hybrid", "fp8_param_gather": True}
    assert job_problems("ppo", memory=memory, precision=precision) == [
        f"memory.{key}=true: weights in FP8 cannot leave the GPU. Set it to false, or "
        "precision.fp8_param_gather=false."
    ]


def test_the_loss_of_a_router_needs_a_mean_over_tokens(job_problems):
    model = {"num_experts": 4, "router_aux_loss_coef": 0.01}
    assert job_problems("sft", model=model) == job_problems("ppo", model=model) == []
    rule = "model.router_aux_loss_coef=0.01: has its weight beside a mean over tokens only; "
    assert job_problems("reward", model=model) == [
        rule + "reward takes one over pairs. Set it to 0."
    ]
    assert job_problems("ppo", model=model, ppo={"aggregation": "macro_mean"}) == [
        rule + "ppo takes one over ppo.aggregation=macro_mean. Set it to 0."
    ]


def test_a_run_directory_may_be_there_or_be_made(tmp_path):
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
        f"run.dir={file / below}: must be a folder that can be written to; {file} is not a folder. "
        "Use another folder."
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
        f"run.dir={read_only / below}: must be a folder that can be written to; {read_only} "
        "cannot be written to. Use another folder."
    )
