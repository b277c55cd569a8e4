"""What the package may import and call, read from its source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import marlhf_mega

PACKAGE = Path(marlhf_mega.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    0: ["config", "algorithm", "platform"],
    1: ["parallel"],
    2: ["models", "data", "metrics"],
    3: ["rollout", "rewards", "checkpoint", "plan"],
    4: ["experience"],
    5: ["update"],
    6: ["train", "cli", "__main__"],
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}

MAY_IMPORT = {
    "megatron": {"platform", "parallel", "models", "checkpoint", "rollout"},
    "torch.distributed": {"platform", "parallel", "checkpoint"},
}


def part_of(path: Path) -> str:
    """The package's direct child a file belongs to: `models`, `cli`, ..."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def calls(path: Path) -> Iterator[tuple[int, str, ast.Call]]:
    """(line, dotted name, call) of every call."""
    for node in ast.walk(ast.parse(path.read_text())):
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
            other = module.split(".")[1]
            if other not in (own, "__version__") and LAYER_OF[other] >= LAYER_OF[own] < 6:
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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_package_logs_and_does_not_print():
    assert [
        f"{path}:{line}" for path in FILES for line, name, _ in calls(path) if name == "print"
    ] == []


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


def test_nothing_from_outside_is_executed():
    wrong = []
    for path in [*FILES, *sorted(PACKAGE.parent.glob("tools/**/*.py"))]:
        wrong += [
            f"{path}:{line}: {module}"
            for line, module in imports(path)
            if (module, path) != ("pickle", BETWEEN_RANKS)
            and (any(within(module, m) for m in UNSAFE_MODULES) or module in UNSAFE_CALLS)
        ]
        for line, name, call in calls(path):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if name in UNSAFE_CALLS:
                wrong.append(f"{path}:{line}: {name}")
            if keywords.get("trust_remote_code", "False") != "False":
                wrong.append(f"{path}:{line}: trust_remote_code")
            if keywords.get("allow_pickle", "False") != "False":
                wrong.append(f"{path}:{line}: allow_pickle")
            if keywords.get("shell", "False") != "False":
                wrong.append(f"{path}:{line}: shell")
    assert wrong == []
