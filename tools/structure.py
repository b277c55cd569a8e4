"""Reports on the package's structure, read from its source alone; `tools/check.py` prints them."""

import ast
import io
import subprocess
import tarfile
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = "marlhf_mega"
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}

Sources = Mapping[str, str]
"""Path relative to the repository's root -> source text."""


def print_reports(root: Path, base: str | None) -> None:
    """Print all reports on the working tree at `root`, compared with a commit if there is one."""
    package = read_tree(root, f"{PACKAGE}/**/*.py")
    before = None if base is None else read_commit(root, base)
    compared = "no base commit" if base is None else f"base: {base}"
    print(f"\npackage lines: code without blanks, comments and docstrings ({compared})")
    print("\n".join(line_table(package, before)))
    print("\nlongest functions")
    functions = function_lengths(package | read_tree(root, "tools/**/*.py"))
    for length, place in sorted(functions, reverse=True)[:10]:
        print(f"{length:5} lines  {place}")
    print("\npublic names defined in more than one module of the package")
    for name, modules in repeated_names(package).items():
        print(f"{name}: {', '.join(modules)}")


def read_tree(root: Path, pattern: str) -> dict[str, str]:
    """Read the files of the working tree that match a glob pattern."""
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(root.glob(pattern))
    }


def find_base(root: Path, base: str | None) -> str | None:
    """Return the short hash of the commit to compare with, None without git or without one.

    Args:
        root: the repository.
        base: a revision; None takes the merge base with origin/main, else HEAD~1.

    Raises:
        ValueError: `base` names no commit.
    """
    if base is not None:
        commit = git(root, "rev-parse", "--short", "--verify", "--quiet", f"{base}^{{commit}}")
        if not commit:
            raise ValueError(f"--base={base}: must name a commit; git knows none. Check it.")
        return commit.decode().strip()
    merge_base = git(root, "merge-base", "HEAD", "origin/main").decode().strip()
    commit = git(root, "rev-parse", "--short", "--verify", "--quiet", merge_base or "HEAD~1")
    return commit.decode().strip() or None


def read_commit(root: Path, commit: str) -> dict[str, str]:
    """Read the package's files of a commit; none if it had no package."""
    archive = git(root, "archive", "--format=tar", commit, PACKAGE)
    if not archive:
        return {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {
            member.name: file.read().decode("utf-8")
            for member in tar
            if member.name.endswith(".py") and (file := tar.extractfile(member))
        }


def git(root: Path, *arguments: str) -> bytes:
    """Return what git prints, nothing if it fails."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        return b""
    return done.stdout if done.returncode == 0 else b""


def line_table(now: Sources, before: Sources | None) -> Iterator[str]:
    """Yield the rows of the table of code lines per folder, with totals."""
    new = lines_per_folder(now)
    if before is None:
        for folder in sorted(new):
            yield f"{folder:16}{new[folder]:8}"
        yield f"{'total':16}{new.total():8}"
        return
    old = lines_per_folder(before)
    yield f"{'':16}{'base':>8}{'now':>8}{'change':>8}"
    for folder in sorted(new | old):
        yield f"{folder:16}{old[folder]:8}{new[folder]:8}{new[folder] - old[folder]:+8}"
    yield f"{'total':16}{old.total():8}{new.total():8}{new.total() - old.total():+8}"


def lines_per_folder(sources: Sources) -> Counter[str]:
    """Count the code lines of each direct subfolder; `.` stands for the package's own modules."""
    counts: Counter[str] = Counter()
    for path, source in sources.items():
        parts = Path(path).parts
        counts[parts[1] if len(parts) > 2 else "."] += code_lines(source)
    return counts


def code_lines(source: str) -> int:
    """Count the lines of code: neither blank nor only comment, docstring or attribute docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def function_lengths(sources: Sources) -> Iterator[tuple[int, str]]:
    """Yield (lines, path:line name) of every function."""
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield lines, f"{path}:{node.lineno} {node.name}"


def repeated_names(sources: Sources) -> dict[str, list[str]]:
    """Return the public names that several modules define, each with those modules."""
    modules: dict[str, list[str]] = defaultdict(list)
    for path, source in sources.items():
        module = path.removeprefix(f"{PACKAGE}/").removesuffix(".py").replace("/", ".")
        for name in sorted(public_names(ast.parse(source))):
            modules[name].append(module)
    return {name: places for name, places in sorted(modules.items()) if len(places) > 1}


def public_names(module: ast.Module) -> set[str]:
    """Return a module's functions, classes, constants and type aliases.

    Of assigned names those that begin with a capital letter count, type variables excepted.
    """
    names: set[str] = set()
    for node in module.body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(value=ast.Call(func=ast.Name(id="TypeVar"))):
                pass
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                names |= {name} if name[0].isupper() else set()
    return {name for name in names if not name.startswith("_")}
