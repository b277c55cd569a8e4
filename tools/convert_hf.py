"""Convert models from and to Hugging Face folders, and check the conversion.

    python tools/convert_hf.py verify HF_DIR --tensor-size 2 --pipeline-size 2
    python tools/convert_hf.py import HF_DIR RUN_DIR --tensor-size 8 --pipeline-size 4
    python tools/convert_hf.py export RUN_DIR HF_DIR --role policy
    python tools/convert_hf.py merge HF_DIR PEFT_DIR NEW_HF_DIR
    python tools/convert_hf.py compare A B

`import` writes a run directory for `model.init` or `reward.source`. `export` writes one role of a
run's newest checkpoint, adapters merged. `merge` writes the model of a Hugging Face folder with
the adapters of a folder of peft. `verify` imports a folder at the given layout, compares logits
and greedy generation with transformers, exports the model, and compares the files bit by bit and
what transformers makes of some texts with the exported tokenizer. `compare` compares two models
tensor by tensor; each is a Hugging Face folder or a run directory. A single rank is
this process; several are started by it. The last line on stdout is one JSON object. Exit codes:
0 done or equal, 1 failed or different, 2 wrong usage (nothing was started).
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from safetensors.torch import load_file, save_file

from marlhf_mega.checkpoint.contents import stored_dtype
from marlhf_mega.checkpoint.hf.auto_tokenizer import text_differences
from marlhf_mega.checkpoint.hf.exporter import ExportReport
from marlhf_mega.checkpoint.hf.reader import HfReader, check_tensors, open_folder
from marlhf_mega.checkpoint.hf.table import Piece, WeightTable
from marlhf_mega.commands import convert
from marlhf_mega.config.checks import check_folder, check_world
from marlhf_mega.config.load import load_config
from marlhf_mega.config.lora import LoraConfig
from marlhf_mega.config.origin import Origin, find_origin
from marlhf_mega.config.peft import lora_from_peft
from marlhf_mega.config.schema import Config
from marlhf_mega.data.tokenizer import Tokenizer, has_tokenizer
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.parallel.collectives import max_over_world
from marlhf_mega.parallel.mesh import Mesh, create_mesh, destroy_mesh
from marlhf_mega.train.export import export_hf

NEW_TOKENS = 12
SEQUENCE_LENGTHS = (7, 16, 11)
REFERENCE = Path(__file__).with_name("hf_reference.py")


def main() -> int:
    """Check the command line and start the ranks; on a rank, do its part of the work."""
    options = _parser().parse_args()
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "import": _import,
        "export": _export,
        "merge": _merge,
        "verify": _verify,
        "compare": _compare,
    }
    try:
        return commands[options.command](options)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    layout = argparse.ArgumentParser(add_help=False)
    for name in ("tensor", "pipeline", "virtual-pipeline", "expert"):
        about = f"parallel.{name.replace('-', '_')}_size (default: 1)"
        layout.add_argument(f"--{name}-size", type=int, default=1, metavar="N", help=about)
    layout.add_argument(
        "--sequence-parallel", action="store_true", help="parallel.sequence_parallel"
    )
    layout.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights (default: as they are)"
    )
    layout.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    role = argparse.ArgumentParser(add_help=False)
    role.add_argument(
        "--role",
        choices=("policy", "critic", "reward"),
        default="policy",
        help="model of a run directory (default: policy)",
    )

    def add(name: str, about: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        description = about[0].upper() + about[1:] + "."
        return commands.add_parser(name, help=about, description=description, parents=parents)

    command = add("import", "read a Hugging Face folder into a new run directory", layout)
    command.add_argument("source", type=Path, help="Hugging Face folder")
    command.add_argument("target", type=Path, help="new run directory")
    command.add_argument(
        "--tokenizer", type=Path, help="tokenizer folder (default: the Hugging Face folder)"
    )
    command = add("export", "write a model of a run as a new Hugging Face folder", layout, role)
    command.add_argument("source", type=Path, help="run directory")
    command.add_argument("target", type=Path, help="new Hugging Face folder")
    command = add("merge", "write a Hugging Face model with adapters of peft merged in", layout)
    command.add_argument("source", type=Path, help="Hugging Face folder of the base")
    command.add_argument("adapters", type=Path, help="folder of peft")
    command.add_argument("target", type=Path, help="new Hugging Face folder")
    command = add("verify", "compare a model at the given layout with transformers", layout)
    command.add_argument("source", type=Path, help="Hugging Face folder")
    command.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help="largest difference of logits, relative to max(1, largest logit) (default: 1e-5)",
    )
    command = add("compare", "compare two models tensor by tensor", role)
    for name in ("first", "second"):
        command.add_argument(name, type=Path, help="Hugging Face folder or run directory")
    return parser


def _import(options: argparse.Namespace) -> int:
    target: Path = options.target
    _check_target(target)
    dtype = getattr(torch, options.dtype) if options.dtype else _file_dtype(options.source)
    # Models compute in float32 or bfloat16; float32 holds every float16 value exactly.
    options.dtype = "bfloat16" if dtype == torch.bfloat16 else "float32"
    config = _config(options, model=f"model.hf_path={options.source.absolute()}", run_dir=target)
    origin = find_origin(options.source, key="model.hf_path")
    role = convert.role_of(origin, key="model.hf_path")
    tokenizer: Path = options.tokenizer or options.source
    _check_source(origin, role)
    Tokenizer.load(tokenizer)

    def work(mesh: Mesh, report: dict[str, Any]) -> None:
        chunks = _read(origin, role, config, mesh, report)
        with _timed(report, "write_seconds"):
            convert.write_run(chunks, role, config, tokenizer, mesh, dtype=dtype)

    return _show(_on_ranks(options, config, work))


def _export(options: argparse.Namespace) -> int:
    dtype = None if options.dtype else convert.dtype_of_files(options.source)
    if options.dtype is None and (stored := stored_dtype(options.source, options.role)):
        options.dtype = str(stored).removeprefix("torch.")
    config = _config(
        options, model=f"model.init={options.source.absolute()}", run_dir=options.source
    )
    origin = find_origin(options.source, key="model.init")
    if not origin.is_run:
        raise ValueError(
            f"{options.source}: must be a run directory; it is a Hugging Face folder. Use another."
        )
    _check_target(options.target)
    write = partial(convert.export_run, origin, options.role)
    return _write_folder(options, config, write, dtype, (origin, options.role))


def _merge(options: argparse.Namespace) -> int:
    dtype = getattr(torch, options.dtype) if options.dtype else _file_dtype(options.source)
    options.dtype = "float32"  # adapters may have more digits than their base
    config = _config(
        options, model=f"model.hf_path={options.source.absolute()}", run_dir=options.source
    )
    origin = find_origin(options.source, key="model.hf_path")
    role = convert.role_of(origin, key="model.hf_path")
    _check_source(origin, role)
    lora_from_peft(options.adapters, LoraConfig(), key="adapters")
    _check_target(options.target)
    write = partial(convert.merge_model, origin, options.adapters)
    return _write_folder(options, config, write, dtype, (origin, role))


def _write_folder(
    options: argparse.Namespace,
    config: Config,
    write: Callable[..., ExportReport],
    dtype: torch.dtype | None,
    model: tuple[Origin, str],
) -> int:
    """Write a role of a model as a Hugging Face folder."""

    def work(mesh: Mesh, report: dict[str, Any]) -> None:
        total = _num_bytes(*model) // mesh.world_size
        with _timed(report, "seconds"), _progress(mesh, "export", total) as advance:
            written = write(config, mesh, target=options.target, dtype=dtype, progress=advance)
            report |= {"tensors": written.num_tensors, "bytes": written.num_bytes}

    return _show(_on_ranks(options, config, work))


def _verify(options: argparse.Namespace) -> int:
    options.dtype = "float32"
    config = _config(
        options, model=f"model.hf_path={options.source.absolute()}", run_dir=Path("verify")
    )
    origin = find_origin(options.source, key="model.hf_path")
    role = convert.role_of(origin, key="model.hf_path")
    work = partial(_verify_rank, options, origin, role, config)
    if _is_rank():
        return _show(_on_ranks(options, config, work))
    _check_source(origin, role)
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = Path(scratch)
        questions = options.scratch / "questions.json"
        questions.write_text(
            json.dumps({"sequences": _sequences(origin), "new_tokens": NEW_TOKENS})
        )
        theirs = options.scratch / "theirs.safetensors"
        _run([sys.executable, str(REFERENCE), str(options.source), str(questions), str(theirs)])
        report = _on_ranks(options, config, work)
        report |= _difference(load_file(options.scratch / "ours.safetensors"), load_file(theirs))
        found = _compare_folders(options.source, options.scratch / "export")
        report |= {"export_exact": not found["different"], "tensors": found["tensors"]}
        report |= _text(options.scratch / "export")
    return _show(report, good=_is_good(report, options.tolerance))


def _text(folder: Path) -> dict[str, Any]:
    """Compare what AutoTokenizer makes of some texts with what we do; None without a tokenizer."""
    if not has_tokenizer(folder):
        return {"text_equal": None}
    differences = list(text_differences(folder, Tokenizer.load(folder)))
    sys.stderr.writelines(f"{line}\n" for line in differences)
    return {"text_equal": not differences}


def _verify_rank(
    options: argparse.Namespace,
    origin: Origin,
    role: str,
    config: Config,
    mesh: Mesh,
    report: dict[str, Any],
) -> None:
    questions = json.loads((options.scratch / "questions.json").read_text())
    chunks = _read(origin, role, config, mesh, report)
    answers = convert.answer_ids(chunks, questions["sequences"], mesh, new_tokens=NEW_TOKENS)
    if mesh.reports_metrics and mesh.dp_rank == 0:
        save_file(answers, options.scratch / "ours.safetensors")
    target, dtype = options.scratch / "export", _file_dtype(options.source)
    total = _num_bytes(origin, role) // mesh.world_size
    with _timed(report, "export_seconds"), _progress(mesh, "export", total) as advance:
        export_hf(chunks, config, mesh, target=target, dtype=dtype, progress=advance)


def _compare(options: argparse.Namespace) -> int:
    """Compare two Hugging Face folders, after exporting what is a run directory."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for number, path in enumerate((options.first, options.second)):
            origin = find_origin(path, key=f"checkpoint {number + 1}")
            folder = path
            if origin.is_run:
                folder = Path(scratch) / str(number)
                command = ["export", str(path), str(folder), "--role", options.role]
                _run([sys.executable, __file__, *command])
            folders.append(folder)
        found = _compare_folders(*folders)
    return _show(found, good=not found["different"])


def _config(options: argparse.Namespace, *, model: str, run_dir: Path) -> Config:
    overrides = [
        model,
        f"run.dir={run_dir.absolute()}",
        f"parallel.tensor_size={options.tensor_size}",
        f"parallel.pipeline_size={options.pipeline_size}",
        f"parallel.virtual_pipeline_size={options.virtual_pipeline_size}",
        f"parallel.expert_size={options.expert_size}",
        f"parallel.sequence_parallel={options.sequence_parallel}",
        f"precision.dtype={options.dtype or 'auto'}",
    ]
    config = load_config(None, overrides)
    check_world(config, _num_ranks(config))
    return config


def _num_ranks(config: Config) -> int:
    parallel = config.parallel
    return parallel.pipeline_size * math.lcm(parallel.tensor_size, parallel.expert_size)


def _table(origin: Origin, role: str) -> WeightTable:
    return WeightTable(origin.model, "causal_lm" if role == "policy" else "sequence_classification")


def _check_target(folder: Path) -> None:
    """Refuse an output folder that holds files or cannot be written."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder}: must be a new folder; it is not empty. Use another.")
    check_folder(folder, key="target")


def _check_source(origin: Origin, role: str) -> None:
    """Refuse a damaged folder before any rank starts."""
    check_tensors(open_folder(origin.path), _table(origin, role).tensors)


def _num_bytes(origin: Origin, role: str) -> int:
    """Estimate the bytes of the model's files."""
    elements = sum(math.prod(shape) for shape in _table(origin, role).tensors.values())
    return elements * _file_dtype(origin.path).itemsize


def _file_dtype(folder: Path) -> torch.dtype:
    if not (folder / "config.json").is_file():
        return torch.float32
    names = open_folder(folder).dtypes
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(min(names), torch.float32)


def _sequences(origin: Origin) -> list[list[int]]:
    """Return fixed token ids without the padding id, which transformers does not score."""
    config = json.loads((origin.path / "config.json").read_text(encoding="utf-8"))
    allowed = [i for i in range(origin.model.vocab_size or 1) if i != config.get("pad_token_id")]
    return [
        [allowed[(31 * k * k + 17 * k + 5 * number) % len(allowed)] for k in range(length)]
        for number, length in enumerate(SEQUENCE_LENGTHS)
    ]


def _is_rank() -> bool:
    """Whether this process is one of the ranks that the tool has started."""
    return "RANK" in os.environ


def _on_ranks(
    options: argparse.Namespace, config: Config, work: Callable[[Mesh, dict[str, Any]], None]
) -> dict[str, Any]:
    """Do a command's work on the ranks of the layout, a single one in this process.

    Returns:
        The first rank's report, on a rank its own.
    """
    if _num_ranks(config) == 1:
        return _do(work, config)
    if _is_rank():
        report = _do(work, config)
        if os.environ["RANK"] == "0":
            (options.scratch / "report.json").write_text(json.dumps(report))
        return report
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = options.scratch or Path(scratch)
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc-per-node", str(_num_ranks(config))]
        arguments = [*sys.argv[1:], "--scratch", str(options.scratch)]
        _run([sys.executable, *launcher, __file__, *arguments])
        first: dict[str, Any] = json.loads((options.scratch / "report.json").read_text())
        return first


def _run(command: Sequence[str]) -> None:
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    environment = os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    if subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode:
        raise RuntimeError(f"{Path(command[1]).name} failed; see its message above.")


def _do(work: Callable[[Mesh, dict[str, Any]], None], config: Config) -> dict[str, Any]:
    """Do this rank's part of the work; return what there is to say about it."""
    mesh = create_mesh(config.parallel)
    report: dict[str, Any] = {"layout": mesh.describe()}
    work(mesh, report)
    kilobytes = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    report["peak_memory_gib"] = round(int(max_over_world(kilobytes)) / 2**20, 3)
    destroy_mesh()
    return report


def _read(
    origin: Origin, role: str, config: Config, mesh: Mesh, report: dict[str, Any]
) -> list[StageModel]:
    total = _num_bytes(origin, role) // mesh.world_size
    with _timed(report, "import_seconds"), _progress(mesh, "import", total) as advance:
        return convert.import_model(origin, role, config, mesh, progress=advance)


@contextmanager
def _timed(report: dict[str, Any], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    report[name] = round(time.perf_counter() - start, 3)


@contextmanager
def _progress(mesh: Mesh, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show rank 0's bytes, rate and remaining time on stderr."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(TextColumn(what), *columns, console=console, disable=mesh.rank != 0) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return how far our answers are from those of transformers."""
    assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
    numbers = [name for name in ours if not name.startswith("generated")]
    generated = [name for name in ours if name.startswith("generated")]
    return {
        "max_logit_diff": max((ours[n] - theirs[n]).abs().max().item() for n in numbers),
        "max_logit": max(theirs[n].abs().max().item() for n in numbers),
        "generated_equal": (
            all(ours[n].equal(theirs[n]) for n in generated) if generated else None
        ),
    }


def _compare_folders(first: Path, second: Path) -> dict[str, Any]:
    """Compare two Hugging Face folders, with one tensor of each in memory at a time."""
    one, other = open_folder(first, key="checkpoint 1"), open_folder(second, key="checkpoint 2")
    different = dict.fromkeys(one.names ^ other.names, "only in one")
    num_bytes = 0
    with Progress(console=Console(stderr=True)) as bar:
        for name in bar.track(sorted(one.names & other.names), description="compare"):
            left, right = _whole(one, name), _whole(other, name)
            num_bytes += left.nbytes + right.nbytes
            if left.shape != right.shape or left.dtype != right.dtype:
                different[name] = (
                    f"{left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)}"
                )
            elif not left.equal(right):
                gap = (left.double() - right.double()).abs().max().item()
                different[name] = f"largest difference {gap:.3g}"
    return {"tensors": len(one.names | other.names), "bytes": num_bytes, "different": different}


def _whole(reader: HfReader, name: str) -> torch.Tensor:
    return reader.read(Piece(name, 0, 0, reader.shape(name)[0]))


def _is_good(report: dict[str, Any], tolerance: float) -> bool:
    close = report["max_logit_diff"] <= tolerance * max(1.0, report["max_logit"])
    same = report["generated_equal"] is not False and report["text_equal"] is not False
    return close and same and report["export_exact"]


def _show(report: dict[str, Any], *, good: bool = True) -> int:
    if not _is_rank():
        sys.stdout.write(json.dumps(report) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
