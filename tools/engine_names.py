"""Writes down what Transformer Engine calls its arguments, for tests that run without it.

    python tools/engine_names.py FOLDER... --megatron SITE_PACKAGES

Each FOLDER holds the Python files of one version, `transformer_engine/pytorch/...`, as a wheel
does. Nothing is imported. Names that this Megatron-Core imports from a version that lacks them are
written down too; if there is no `try` around the import, they are printed and the exit code is 1.
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

TARGET = Path(__file__).parents[1] / "tests" / "engine" / "names.json"
CLASSES = {
    "Linear": "module/linear.py",
    "LayerNormLinear": "module/layernorm_linear.py",
    "GroupedLinear": "module/grouped_linear.py",
    "RMSNorm": "module/rmsnorm.py",
    "DotProductAttention": "attention/dot_product_attention/dot_product_attention.py",
}
"""Of `transformer_engine.pytorch`, which the layers of Megatron-Core are made of."""
FUNCTIONS = {"general_gemm": "cpp_extensions/gemm.py"}
"""Likewise; the product of a router."""

Names = dict[str, list[str]]


def argument_names(folder: Path) -> Names:
    """Return the names that functions, and `__init__` and `forward` of classes, take.

    `**` stands for any.
    """
    found: Names = {}
    for name, file in (CLASSES | FUNCTIONS).items():
        tree = ast.parse((folder / "transformer_engine" / "pytorch" / file).read_text())
        kind = ast.ClassDef if name in CLASSES else ast.FunctionDef
        (definition,) = (n for n in tree.body if isinstance(n, kind) and n.name == name)
        if isinstance(definition, ast.FunctionDef):
            found[name] = _taken(definition)
            continue
        for method in definition.body:
            if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "forward"):
                found[f"{name}.{method.name}"] = _taken(method)[1:]
    return found


def _taken(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [arg.arg for arg in (*arguments.args, *arguments.kwonlyargs)]
    return names + ["**"] * (arguments.kwarg is not None)


def version_of(folder: Path) -> str:
    """Return the version that a folder holds, from the metadata beside it or its own name."""
    for metadata in folder.glob("transformer_engine*.dist-info/METADATA"):
        if match := re.search(r"^Version: (\S+)", metadata.read_text(), re.MULTILINE):
            return match[1]
    return folder.name


def missing(megatron: Path, folder: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield what Megatron-Core imports and a version lacks.

    Yields:
        `file:line` of the import, `module.name`, and whether a `try` is around it.
    """
    for path in sorted((megatron / "megatron" / "core").rglob("*.py")):
        tree = ast.parse(path.read_text())
        guarded = {
            id(inner)
            for outer in ast.walk(tree)
            if isinstance(outer, ast.Try)
            for inner in ast.walk(outer)
        }
        for node in ast.walk(tree):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            if isinstance(node, ast.ImportFrom) and module.split(".")[0] == "transformer_engine":
                known, place = (
                    _defined(folder, module),
                    f"{path.relative_to(megatron)}:{node.lineno}",
                )
                for name in node.names:
                    if known is None or not (name.name in known or "*" in known):
                        yield place, f"{module}.{name.name}", id(node) in guarded


def _defined(folder: Path, module: str) -> set[str] | None:
    """Return what a module defines or imports; `*` if it imports whole modules."""
    path = folder.joinpath(*module.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    if not file.exists():
        return None
    names = {p.stem for p in path.iterdir()} if path.is_dir() else set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def main() -> int:
    """Write the file; print what is missing."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="one per version")
    options.add_argument(
        "--megatron", type=Path, required=True, help="folder that holds megatron/core"
    )
    options.add_argument("--out", type=Path, default=TARGET, help=f"default: {TARGET.name}")
    args = options.parse_args()
    known: dict[str, Names] = json.loads(args.out.read_text()) if args.out.exists() else {}
    complaints = []
    for folder in args.folders:
        version = version_of(folder)
        lacks = list(missing(args.megatron, folder))
        known[version] = argument_names(folder) | {"lacks": sorted({name for _, name, _ in lacks})}
        complaints += [f"{version}: {place}: {name}" for place, name, safe in lacks if not safe]
    args.out.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    print("\n".join(complaints) or "Megatron-Core imports nothing that is missing")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
