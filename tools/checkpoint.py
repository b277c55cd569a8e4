"""Inspect, verify and compare checkpoints of any layout, in one process and without a GPU.

    python tools/checkpoint.py inspect runs/quickstart/ppo
    python tools/checkpoint.py verify runs/quickstart/ppo
    python tools/checkpoint.py compare runs/a runs/b/checkpoints/step_000012 --json

`inspect` shows a checkpoint's step, layout and versions, and the shape, dtype and size of every
tensor without reading it. `verify` checks the size and sha256 of every file against the manifest,
for each checkpoint of a run, and prints one line per fault. `compare` compares two checkpoints
bit by bit, tensor by tensor, even if their layouts differ. `inspect` and `compare` take the newest
checkpoint of a run directory. Exit codes: 0 intact or equal, 1 damaged or different, 2 wrong usage.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from marlhf_mega.checkpoint import folders, manifest
from marlhf_mega.checkpoint.metadata import TensorFacts, read_tensors

READ_BYTES = 1 << 30
"""Bytes of tensors compared at a time; a larger tensor is compared alone."""
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Padded with zero rows to a multiple of the tensor-parallel size."""

Report = dict[str, Any]


def main() -> int:
    """Run one command; return the exit code."""
    options = _parser().parse_args()
    commands: dict[str, Callable[[argparse.Namespace], tuple[Report, list[str], bool]]] = {
        "inspect": _inspect,
        "verify": _verify,
        "compare": _compare,
    }
    try:
        report, lines, good = commands[options.command](options)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write((json.dumps(report) if options.json else "\n".join(lines)) + "\n")
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about, paths in (
        ("inspect", "show step, roles and tensors", ("path",)),
        ("verify", "check every file against the manifest", ("path",)),
        ("compare", "compare two checkpoints tensor by tensor", ("first", "second")),
    ):
        command = commands.add_parser(name, help=about, description=about.capitalize() + ".")
        for path in paths:
            command.add_argument(path, type=Path, help="run directory or checkpoint folder")
        command.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def _inspect(options: argparse.Namespace) -> tuple[Report, list[str], bool]:
    root = _root(options.path)
    folder = _checkpoint(options.path)
    about, whole = _read(folder)
    roles = {name: _role(folder, name, about["files"]) for name in whole["roles"]}
    report: Report = {
        "checkpoint": str(folder),
        "step": whole["step"],
        "layout": about["layout"],
        "versions": about["versions"],
        "bytes": _bytes(about["files"]),
        "state": whole["state"],
        "roles": {name: whole["roles"][name] | role for name, role in roles.items()},
    }
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{folder}: step {whole['step']}, {_size(report['bytes'])}",
        f"  written at {about['layout']}, with {versions}",
        f"  state: {', '.join(whole['state']) or 'none'}",
    ]
    for name, role in report["roles"].items():
        lines += _role_lines(name, role)
    if root is not None:
        report["checkpoints"] = sorted(folders.candidates(root)[0])
        lines.append(f"{root} holds {', '.join(report['checkpoints'])}")
    return report, lines, True


def _role(folder: Path, name: str, files: Mapping[str, manifest.Facts]) -> Report:
    tensors = read_tensors(folder / name)
    return {
        "bytes": _bytes({f: facts for f, facts in files.items() if Path(f).parts[0] == name}),
        "tensors": {
            key: {
                "shape": list(facts.shape),
                "dtype": str(facts.dtype).removeprefix("torch."),
                "bytes": facts.num_bytes,
            }
            for key, facts in sorted(tensors.items())
        },
    }


def _role_lines(name: str, role: Report) -> Iterator[str]:
    steps = f", {role['optimizer_steps']} optimizer steps" if "optimizer_steps" in role else ""
    yield f"{name}: {len(role['tensors'])} tensors, {_size(role['bytes'])}{steps}"
    width = max(map(len, role["tensors"]), default=0)
    for key, facts in role["tensors"].items():
        shape = "x".join(map(str, facts["shape"])) or "scalar"
        yield f"  {key:{width}}  {facts['dtype']:8}  {shape:>16}  {_size(facts['bytes']):>10}"


def _verify(options: argparse.Namespace) -> tuple[Report, list[str], bool]:
    root = _root(options.path)
    remarks: list[str] = []
    checked = [options.path]
    if root is not None:
        names, remarks = folders.candidates(root)
        checked = [root / name for name in sorted(names)]
    report: Report = {"checkpoints": {}, "faults": remarks}
    lines = [f"{root}: {remark}" for remark in remarks]
    for folder in checked:
        faults, files = _faults(folder)
        report["checkpoints"][str(folder)] = {
            "files": len(files),
            "bytes": _bytes(files),
            "faults": faults,
        }
        lines += [f"{folder}: {fault}" for fault in faults]
        if not faults:
            size = _size(_bytes(files))
            lines.append(f"{folder}: {len(files)} files, {size}, intact")
    good = not remarks and not any(c["faults"] for c in report["checkpoints"].values())
    return report, lines, good


def _faults(folder: Path) -> tuple[list[str], Mapping[str, manifest.Facts]]:
    """Return the faults of a checkpoint, and the files that its manifest lists."""
    try:
        files = manifest.read(folder)["files"]
    except ValueError as error:
        return [str(error)], {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda name: manifest.check_file(folder, name, files[name]), files)
        return [fault for fault in found if fault is not None], files


def _compare(options: argparse.Namespace) -> tuple[Report, list[str], bool]:
    one, other = _checkpoint(options.first), _checkpoint(options.second)
    states = [_read(folder)[1] for folder in (one, other)]
    report: Report = {"checkpoints": [str(one), str(other)], "roles": {}, "different": {}}
    different = report["different"]
    for name in sorted(states[0]["roles"].keys() | states[1]["roles"].keys()):
        if not all(name in state["roles"] for state in states):
            different[name] = "only in one"
            continue
        tensors, faults = _compare_roles(one / name, other / name)
        report["roles"][name] = {"tensors": tensors, "different": len(faults)}
        different |= {f"{name}.{key}": fault for key, fault in faults.items()}
    different |= dict(_compare_states(*states))
    lines = [f"{key}: {fault}" for key, fault in different.items()]
    for name, found in report["roles"].items():
        same = found["tensors"] - found["different"]
        lines.append(f"{name}: {same} of {found['tensors']} tensors are equal")
    return report, lines, not different


def _compare_roles(one: Path, other: Path) -> tuple[int, dict[str, str]]:
    """Return the number of tensors and the differences by tensor name."""
    tables = read_tensors(one), read_tensors(other)
    common = sorted(tables[0].keys() & tables[1].keys())
    different = dict.fromkeys(sorted(tables[0].keys() ^ tables[1].keys()), "only in one")
    num_tensors = len(common) + len(different)
    for names in _portions(common, tables[0]):
        left = _load(one, {name: tables[0][name] for name in names})
        right = _load(other, {name: tables[1][name] for name in names})
        for name in names:
            fault = _difference(name, left.pop(name), right.pop(name))
            if fault is not None:
                different[name] = fault
    return num_tensors, different


def _portions(names: Sequence[str], table: Mapping[str, TensorFacts]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for name in names:
        size += table[name].num_bytes
        if portion and size > READ_BYTES:
            yield portion
            portion, size = [], table[name].num_bytes
        portion.append(name)
    if portion:
        yield portion


def _load(folder: Path, table: Mapping[str, TensorFacts]) -> dict[str, Any]:
    """Read full tensors; `read_tensors` must have checked the folder's table."""
    tensors: dict[str, Any] = {
        name: torch.empty(facts.shape, dtype=facts.dtype) for name, facts in table.items()
    }
    with warnings.catch_warnings():
        # Torch warns that there is only one process.
        warnings.simplefilter("ignore", UserWarning)
        load(tensors, storage_reader=FileSystemReader(folder), no_dist=True)
    return tensors


def _difference(name: str, left: Tensor, right: Tensor) -> str | None:
    if left.dtype != right.dtype:
        return f"{left.dtype} and {right.dtype}"
    if name.endswith(PADDED) and left.shape[1:] == right.shape[1:]:
        rows = min(len(left), len(right))
        if not (left[rows:].any() or right[rows:].any()):
            left, right = left[:rows], right[:rows]
    if left.shape != right.shape:
        return f"{list(left.shape)} and {list(right.shape)}"
    if _bits(left).equal(_bits(right)):
        return None
    return f"largest difference {(left.double() - right.double()).abs().max().item():.3g}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().view(torch.uint8)


def _compare_states(one: Report, other: Report) -> Iterator[tuple[str, str]]:
    """Yield the differences besides tensors; configuration and layout may differ."""
    left, right = (
        {"step": whole["step"]}
        | {f"{role}.{key}": n for role, p in whole["roles"].items() for key, n in p.items()}
        | {f"state.{key}": value for key, value in whole["state"].items() if key != "config"}
        for whole in (one, other)
    )
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key):
            yield key, f"{left.get(key)} and {right.get(key)}"


def _root(path: Path) -> Path | None:
    """Return the folder of a run's checkpoints, None if the path is itself a checkpoint."""
    root = path / "checkpoints"
    if root.is_dir():
        return root
    if (path / manifest.FILE).is_file() or (path / manifest.STATE).is_file():
        return None
    raise ValueError(
        f"{path}: must be a run directory or a checkpoint; it has neither a folder checkpoints nor "
        f"a file {manifest.FILE}. Use another path."
    )


def _checkpoint(path: Path) -> Path:
    root = _root(path)
    if root is None:
        return path
    names, _ = folders.candidates(root)
    if not names:
        raise ValueError(f"{root}: must hold a checkpoint; it is empty. Use another run.")
    return root / names[0]


def _read(folder: Path) -> tuple[Report, Report]:
    """Return a checkpoint's manifest and its state.

    Raises:
        RuntimeError: either file is damaged.
    """
    try:
        about = manifest.read(folder)
        fault = manifest.check_file(folder, manifest.STATE, about["files"][manifest.STATE])
    except ValueError as error:
        fault = str(error)
    if fault is not None:
        raise RuntimeError(f"{folder}: must be intact; {fault}. Use another checkpoint.")
    return about, json.loads((folder / manifest.STATE).read_text(encoding="utf-8"))


def _bytes(files: Mapping[str, manifest.Facts]) -> int:
    return sum(int(facts["bytes"]) for facts in files.values())


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


if __name__ == "__main__":
    sys.exit(main())
