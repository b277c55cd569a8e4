"""What the package may import and call, and where its tests are, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import marlhf_mega

PACKAGE = Path(marlhf_mega.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = Path(__file__).parents[1]
UNIT = Path(__file__).parent

LAYERS = {
    1: ["config", "algorithm", "platform", "durable", "garbage", "lifeline", "user_code"],
    2: ["rewards", "data", "metrics", "parallel"],
    3: ["report", "resilience", "models", "plan"],
    4: ["rollout", "checkpoint"],
    5: ["experience"],
    6: ["update"],
    7: ["train"],
    8: ["commands"],
    9: ["cli", "jobs", "__main__"],
}
CHOICES = "marlhf_mega.algorithm.choices"
"""The one import between siblings: the configuration offers the names that algorithms implement."""
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}

MAY_IMPORT = {
    "megatron": {"platform", "parallel", "models", "checkpoint", "rollout"},
    "torch.distributed": {"platform", "parallel", "checkpoint"},
}


def part_of(path: Path) -> str:
    """The package's direct child a file belongs to: `models`, `cli`, ..."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All nodes of a file's syntax tree."""
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, also inside functions."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def calls(path: Path) -> Iterator[tuple[int, str, ast.Call]]:
    """(line, dotted name, call) of every call."""
    for node in nodes(path):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def test_every_part_of_the_package_has_a_layer():
    parts = {part_of(path) for path in FILES} - {"__init__"}
    assert parts - set(LAYER_OF) == set()


def test_imports_point_down_only_and_not_sideways():
    wrong = []
    for path in FILES:
        own = part_of(path)
        for line, module in imports(path):
            if not within(module, "marlhf_mega") or own == "__init__":
                continue
            if own == "config" and within(module, CHOICES):
                continue
            other = module.split(".")[1]
            if other not in (own, "__version__") and LAYER_OF[other] >= LAYER_OF[own] < 9:
                wrong.append(f"{path}:{line}: {own} imports {other}")
    assert wrong == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_only_some_parts_import(package):
    wrong = [
        f"{path}:{line}"
        for path in FILES
        for line, module in imports(path)
        if within(module, package) and part_of(path) not in MAY_IMPORT[package]
    ]
    assert wrong == []


def test_only_the_platform_calls_torch_cuda():
    wrong = [
        f"{path}:{line}: {name}"
        for path in FILES
        if part_of(path) != "platform"
        for line, name, _ in calls(path)
        if within(name, "torch.cuda")
    ]
    assert wrong == []


@pytest.mark.parametrize("part", ["algorithm", "metrics", "rewards", "config"])
def test_a_part_without_megatron_imports_without_it(part):
    code = (
        "import importlib, pkgutil, sys\n"
        f"import marlhf_mega.{part} as part\n"
        "for module in pkgutil.walk_packages(part.__path__, part.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'megatron']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_package_logs_and_does_not_print():
    assert [
        f"{path}:{line}" for path in FILES for line, name, _ in calls(path) if name == "print"
    ] == []


IN_THE_SANDBOX = PACKAGE / "rewards" / "sandbox_tests.py"
"""Runs the programs of a model, isolated from this machine."""

UNSAFE_CALLS = {
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "numpy.load",
    "np.load",
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
}
UNSAFE_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
BETWEEN_RANKS = PACKAGE / "parallel" / "launch.py"
"""Ranks of one launch send each other objects, as `torch.distributed` does for those of a world."""
TABLES = PACKAGE / "checkpoint" / "metadata.py"
"""Unpickles with a `find_class` that gives only records of its own."""


def test_nothing_from_outside_is_executed():
    wrong = []
    for path in [*FILES, *sorted(PACKAGE.parent.glob("tools/**/*.py"))]:
        wrong += [
            f"{path}:{line}: {module}"
            for line, module in imports(path)
            if not (module == "pickle" and path in (BETWEEN_RANKS, TABLES))
            and (any(within(module, m) for m in UNSAFE_MODULES) or module in UNSAFE_CALLS)
        ]
        for line, name, call in calls(path):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            is_safe_load = name == "torch.load" and keywords.get("weights_only") == "True"
            if name in UNSAFE_CALLS and not is_safe_load and path != IN_THE_SANDBOX:
                wrong.append(f"{path}:{line}: {name}")
            if keywords.get("trust_remote_code", "False") != "False":
                wrong.append(f"{path}:{line}: trust_remote_code")
            if keywords.get("allow_pickle", "False") != "False":
                wrong.append(f"{path}:{line}: allow_pickle")
            if keywords.get("shell", "False") != "False":
                wrong.append(f"{path}:{line}: shell")
    assert wrong == []


TESTED_ELSEWHERE = {
    "rewards/sandbox_tests.py": "unit/rewards/test_code.py::test_tests_may_call_a_function",
    "checkpoint/contents.py": "unit/train/test_resume.py::test_before_a_start_the_newest_checkpoint_decides",
    "checkpoint/hf/parameters.py": "unit/checkpoint/test_reshard.py",
    "checkpoint/saver.py": "distributed/checkpoint_kill_ranks.py",
    "checkpoint/sharded.py": "distributed/checkpoint_resume_ranks.py",
    "checkpoint/store.py": "distributed/checkpoint_damage_ranks.py",
    "checkpoint/weights.py": "distributed/layouts_ranks.py",
    "commands/convert.py": "distributed/test_convert_hf.py::test_import_and_export_keep_every_bit",
    "commands/generate_inputs.py": "unit/commands/test_generate.py::test_a_check_knows_the_answers_that_are_there",
    "config/exit_codes.py": "unit/test_cli.py::test_codes_that_all_ranks_end_with_are_left_for_the_launcher",
    "config/sections/data.py": "unit/config/test_load.py::test_data_may_be_a_path_or_a_list_of_paths_with_weights",
    "config/sections/hardware.py": "unit/parallel/test_mesh.py",
    "config/sections/offline.py": "e2e/test_matrix.py::test_every_choice_trains",
    "config/sections/ppo.py": "unit/config/test_methods.py::test_advantages_are_whitened_where_the_paper_does",
    "config/sections/rollout.py": "unit/config/test_load.py::test_keys_that_contradict_each_other",
    "config/sections/training.py": "unit/config/test_unread.py::test_a_warm_up_as_long_as_the_run_never_lets_the_learning_rate_be",
    "data/tokenizer_backends.py": "unit/data/test_tokenizer.py::test_offsets_by_hand",
    "experience/builder.py": "distributed/layouts_ranks.py",
    "experience/continuations.py": "e2e/test_ppo_rules.py::test_values_of_vine_are_the_mean_scores_of_continuations",
    "experience/evaluation.py": "distributed/reshard_ranks.py",
    "experience/scoring.py": "distributed/layouts_ranks.py",
    "experience/rewarding.py": "e2e/test_ppo_rules.py::test_every_reward_trains",
    "jobs.py": "unit/test_cli.py",
    "models/gpt.py": "distributed/layouts_ranks.py",
    "models/latent_head.py": "unit/train/test_user_latents.py::test_microbatches_add_up_to_the_gradient_of_the_formula",
    "models/offload.py": "distributed/offload_ranks.py",
    "parallel/collectives.py": "distributed/layouts_ranks.py",
    "parallel/fake_mesh.py": "unit/plan/test_parameters.py",
    "parallel/launch.py": "e2e/test_rollout_ranks.py::test_either_side_has_a_layout_of_its_own",
    "parallel/resharder.py": "distributed/test_reshard.py::test_weights_travel_bit_for_bit_there_and_back",
    "parallel/schedule.py": "distributed/memory_ranks.py",
    "plan/buffers.py": "unit/plan/test_parameters.py",
    "platform/cuda_graphs.py": "gpu/test_one_gpu.py::test_sft_reward_model_and_ppo_run_in_bfloat16",
    "platform/no_transformer_engine.py": "distributed/test_cpu_shim.py::test_sharded_training_steps_equal_those_of_one_rank",
    "rewards/sandbox_child.py": "unit/rewards/test_sandbox.py::test_a_program_gets_its_input_and_its_output_comes_back",
    "rewards/worker.py": "unit/rewards/test_rule.py::test_scores_come_back_in_order_over_many_chunks",
    "rollout/remote.py": "e2e/test_rollout_ranks.py::test_without_staleness_no_number_changes",
    "rollout/reshard.py": "distributed/test_reshard.py::test_rollouts_do_not_depend_on_their_layout",
    "train/build.py": "e2e/test_reward.py::test_labels_do_not_depend_on_the_layout",
    "train/checkpoints.py": "e2e/test_jobs.py::test_a_damaged_checkpoint_is_named_and_the_one_before_is_used",
    "train/mask_policy.py": "e2e/test_ppo_rules.py::test_the_mask_policy_is_an_older_copy_and_a_resume_has_it",
    "train/online_pairs.py": "e2e/test_preference.py::test_pairs_are_drawn_and_judged_as_if_one_by_one",
    "train/offline_known.py": "e2e/test_offline.py::test_four_ranks_give_the_numbers_of_one",
    "train/preference.py": "e2e/test_preference.py",
    "train/ppo.py": "e2e/test_ppo_rules.py",
    "train/preference_inputs.py": "e2e/test_preference.py::test_data_and_models_that_do_not_suit_the_keys_are_refused",
    "train/preference_pairs.py": "e2e/test_preference.py::test_every_loss_trains_two_steps_padded_as_packed",
    "train/reference_sums.py": "e2e/test_preference.py::test_runs_share_log_probs_of_one_reference_and_not_of_another",
    "train/reward_pairs.py": "distributed/layouts_ranks.py",
    "train/reward.py": "e2e/test_reward.py::test_labels_do_not_depend_on_the_layout",
    "train/rollout_server.py": "e2e/test_rollout_ranks.py::test_faults_of_a_rank_that_generates_change_no_number",
    "train/sft.py": "e2e/test_offline.py::test_plain_likelihood_is_that_of_sft",
    "train/summary.py": "unit/test_cli.py::test_every_job_says_what_it_would_do",
    "train/supervised.py": "e2e/test_offline.py::test_plain_likelihood_is_that_of_sft",
    "update/fp8_guard.py": "distributed/divergence_ranks.py",
    "user_code.py": "unit/rewards/test_rule.py::test_a_function_may_be_named_by_its_file_and_use_what_lies_beside_it",
}
"""Modules without a unit test of their own: the script or test under tests/ that exercises each.

A script imports the module. Where the module runs in a process that a test starts, the entry names
that test: FILE::TEST.
"""


def has_logic(path: Path) -> bool:
    """Whether a function or method of a file does anything."""
    return any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not all(
            isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in node.body
        )
        for node in nodes(path)
    )


def unit_test_of(module: str) -> Path:
    """Where the unit test of a module, such as `plan/search.py`, is."""
    path = Path(module)
    return UNIT / path.parent / f"test_{path.name}"


def test_every_module_with_logic_has_a_test():
    modules = {str(p.relative_to(PACKAGE)) for p in FILES if has_logic(p) and p.stem != "__init__"}
    own = {module for module in modules if unit_test_of(module).exists()}
    listed = set(TESTED_ELSEWHERE)
    untested, outdated = modules - own - listed, listed - (modules - own)
    assert untested == set(), "Write tests/unit/PACKAGE/test_MODULE.py, or add to TESTED_ELSEWHERE."
    assert outdated == set(), "Remove them from TESTED_ELSEWHERE."


def test_a_test_in_the_folder_of_a_package_is_named_after_a_module():
    packages = {path.parent.relative_to(PACKAGE) for path in FILES} - {Path()}
    tests = {path for package in packages for path in (UNIT / package).glob("test_*.py")}
    assert tests - {unit_test_of(str(path.relative_to(PACKAGE))) for path in FILES} == set()


def test_modules_without_a_unit_test_are_exercised_elsewhere():
    wrong = []
    for module, entry in TESTED_ELSEWHERE.items():
        file, _, test = entry.partition("::")
        if test:
            found = f"def {test}(" in (TESTS / file).read_text()
        else:
            name = ".".join(["marlhf_mega", *Path(module).with_suffix("").parts])
            found = any(within(other, name) for _, other in imports(TESTS / file))
        wrong += [] if found else [f"{module}: {entry}"]
    assert wrong == []
