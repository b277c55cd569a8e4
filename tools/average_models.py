"""Average models of one shape, weight by weight, into a new Hugging Face folder.

    python tools/average_models.py OUT runs/a runs/b runs/c
    python tools/average_models.py OUT SFT_DIR PPO_DIR --weights 0.2,0.8
    python tools/average_models.py OUT SFT_DIR PPO_DIR --block-weights 0.3,0.2,0.1
    python tools/average_models.py OUT SFT_DIR PPO_DIR --block-logits 0.5,-0.2,0.1 --ratio 0.2

A model is a Hugging Face folder, or a run directory, of which `--role` of the newest checkpoint is
exported first. `--weights` has one weight per model, adding up to 1 (default: equal ones).
`--block-weights` has the weights of the first of two models in equal blocks of layers; the
embedding belongs to the first block, the final norm and the head to the last. `--block-logits` u
gives them the form of adaptive model averaging (Lin et al. 2023, arXiv 2309.06256),
a_b = ratio (sigma(u_b) + 0.2) B / sum(sigma(u) + 0.2), whose mean is the ratio; the tool does not
train u. Sums are in float64 and rounded once to the number format of the first
model; a model of that format and of weight 1 is copied bit for bit. A few blocks of rows are in
memory at a time. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from marlhf_mega import durable
from marlhf_mega.checkpoint.hf.reader import HfReader, open_folder
from marlhf_mega.checkpoint.hf.shards import BlockWriter, create_files, plan_shards, write_index
from marlhf_mega.checkpoint.hf.side_files import SideFiles, write_side_files
from marlhf_mega.checkpoint.hf.table import Piece
from marlhf_mega.config.checks import check_folder
from marlhf_mega.config.hf import model_config_from_hf
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.data.tokenizer import Tokenizer, has_tokenizer

BLOCK_ELEMENTS = 1 << 23
SHARD_BYTES = 5 * 10**9
AMA_EPSILON = 0.2
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def main() -> int:
    """Average; return the exit code."""
    options = _parser().parse_args()
    try:
        weights = _weights(options)
        _check_target(options.out)
        with tempfile.TemporaryDirectory(dir=options.out.absolute().parent) as scratch:
            folders = [
                _folder(path, Path(scratch, str(number)), options.role)
                for number, path in enumerate(options.models)
            ]
            average(folders, options.out, weights, names=options.models)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except (RuntimeError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{options.out}: the average of {len(options.models)} models\n")
    return 0


def block_weights(logits: Sequence[float], ratio: float) -> list[float]:
    """Return a_b = ratio (sigma(u_b) + e) B / sum(sigma(u) + e), e = 0.2: their mean is `ratio`."""
    shares = [1 / (1 + math.exp(-u)) + AMA_EPSILON for u in logits]
    return [ratio * share * len(shares) / sum(shares) for share in shares]


@dataclass(frozen=True)
class Model:
    """One of the models."""

    name: str
    """As the user wrote it."""
    folder: Path
    config: ModelConfig
    reader: HfReader


def average(
    folders: Sequence[Path], out: Path, weights: Sequence[Sequence[float]], *, names: Sequence[Path]
) -> None:
    """Write the weighted sums, in the number format of the first model.

    Args:
        folders: Hugging Face folders.
        out: the new folder.
        weights: of each model in each block of layers.
        names: of the models, for messages.

    Raises:
        ValueError: the models do not fit together.
    """
    models = [_open(folder, str(name)) for folder, name in zip(folders, names, strict=True)]
    first, num_blocks = models[0], len(weights[0])
    for model in models[1:]:
        _check_same(first, model)
    if num_blocks > first.config.num_layers:
        raise ValueError(
            f"{first.name}: must have a layer for each of {num_blocks} blocks; it has "
            f"{first.config.num_layers}. Give fewer weights."
        )
    shapes = {name: first.reader.shape(name) for name in sorted(first.reader.names)}
    plan = plan_shards(shapes, _dtype(first), SHARD_BYTES)
    if shutil.disk_usage(out.absolute().parent).free < plan.num_bytes:
        raise ValueError(f"{out}: needs {plan.num_bytes:,} bytes of disk. Free space.")
    partial = out.with_name(out.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_side_files(
            partial,
            SideFiles(source=first.folder),
            config=first.config,
            head="sequence_classification" if "score.weight" in shapes else "causal_lm",
            dtype=str(plan.dtype).removeprefix("torch."),
        )
        create_files(plan, partial)
        with BlockWriter(plan, partial) as files:
            for name in shapes:
                block = _block_of(name, first.config.num_layers, num_blocks)
                parts = [
                    (model.reader, own[block])
                    for model, own in zip(models, weights, strict=True)
                    if own[block]
                ]
                for piece in _pieces(name, shapes[name]):
                    files.write(name, piece.lo, _sum(parts, piece, plan.dtype))
        write_index(plan, partial)
        durable.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _pieces(name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """Cut a tensor into blocks of rows."""
    step = max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield Piece(name, 0, start, min(start + step, shape[0]))


def _sum(parts: Sequence[tuple[HfReader, float]], piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    (reader, weight), *rest = parts
    if weight == 1 and not rest:
        return reader.read(piece).to(dtype)
    total = weight * reader.read(piece).double()
    for reader, weight in rest:
        total += weight * reader.read(piece).double()
    return total.to(dtype)


def _block_of(name: str, num_layers: int, num_blocks: int) -> int:
    """Return the block that a tensor belongs to."""
    if match := _LAYER.match(name):
        return int(match[1]) * num_blocks // num_layers
    return 0 if name.startswith("model.embed_tokens.") else num_blocks - 1


def _open(folder: Path, name: str) -> Model:
    config = model_config_from_hf(folder, ModelConfig(), key=name)
    return Model(name, folder, config, open_folder(folder, key=name))


def _dtype(model: Model) -> torch.dtype:
    kinds = sorted(model.reader.dtypes)
    if len(kinds) != 1 or kinds[0] not in _DTYPES:
        raise ValueError(
            f"{model.name}: must have tensors of one number format, {', '.join(_DTYPES)}; it has "
            f"{', '.join(kinds)}. Convert it."
        )
    return _DTYPES[kinds[0]]


def _check_same(first: Model, other: Model) -> None:
    """Refuse models whose sum would be none."""
    pair = f"{first.name} and {other.name}"
    if different := sorted(first.reader.names ^ other.reader.names):
        raise ValueError(
            f"{pair}: must have the same tensors; {len(different)} are in one of them only: "
            f"{different[0]}. Use models of the same kind."
        )
    for name in sorted(first.reader.names):
        shapes = [list(model.reader.shape(name)) for model in (first, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{pair}: must have tensors of the same shapes; {name} is {shapes[0]} and "
                f"{shapes[1]}. Use models of the same shape and vocabulary."
            )
    left, right = (m.config.model_dump(exclude={"hf_path"}) for m in (first, other))
    for key, value in left.items():
        if value != right[key]:
            raise ValueError(
                f"{pair}: must have the same architecture; {key} is {value} and {right[key]}. Use "
                "models that were trained from the same one."
            )
    if all(has_tokenizer(model.folder) for model in (first, other)):
        prints = {Tokenizer.load(model.folder).fingerprint() for model in (first, other)}
        if len(prints) > 1:
            raise ValueError(
                f"{pair}: must have the same tokenizer; they have different ones. Use models of "
                "the same vocabulary."
            )


def _folder(path: Path, scratch: Path, role: str) -> Path:
    """Return a Hugging Face folder of a model, for a run directory after exporting it."""
    if not (path / "config.yaml").is_file():
        return path
    tool = Path(__file__).with_name("convert_hf.py")
    command = [sys.executable, str(tool), "export", str(path), str(scratch), "--role", role]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode:
        raise RuntimeError(f"{path}: must be exportable; see the message above.")
    return scratch


def _check_target(folder: Path) -> None:
    if folder.exists():
        raise ValueError(f"{folder}: must be a new folder; it is there. Use another.")
    check_folder(folder, key="OUT")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)


def _weights(options: argparse.Namespace) -> list[list[float]]:
    """Return the weights of each model in each block."""
    count = len(options.models)
    if options.block_weights is None and options.block_logits is None:
        found = options.weights or [1 / count] * count
        if len(found) != count or not math.isclose(sum(found), 1, abs_tol=1e-6):
            shown = ",".join(f"{weight:g}" for weight in found)
            raise ValueError(
                f"--weights={shown}: must be {count} numbers, one for each model, that add up to "
                f"1; they are {len(found)} and add up to {sum(found):g}. Change them."
            )
        return [[weight] for weight in found]
    if count != 2:
        raise ValueError(
            f"--block-weights: are those of the first of two models; {count} are given. Give two."
        )
    of_first = options.block_weights or block_weights(options.block_logits, options.ratio)
    return [of_first, [1 - weight for weight in of_first]]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="new Hugging Face folder")
    parser.add_argument("models", type=Path, nargs="+", help="Hugging Face folders or runs")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--weights", type=_numbers, help="one for each model")
    how.add_argument("--block-weights", type=_numbers, help="of the first of two models")
    how.add_argument("--block-logits", type=_numbers, help="the same, before normalisation")
    parser.add_argument("--ratio", type=float, default=0.2, help="mean of the block weights")
    parser.add_argument(
        "--role", choices=["policy", "critic", "reward"], default="policy", help="of runs"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
