"""One trained role as a Megatron `torch_dist` folder: named tensors, independent of the layout."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as save_planned
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from marlhf_mega.checkpoint import optimizer_state
from marlhf_mega.checkpoint.metadata import read_shapes
from marlhf_mega.models.fp8 import exact_value
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import Mesh

Role = TrainState | Sequence[StageModel]
"""A model that learns, or only its weights."""
Tensors = dict[str, Any]
"""Nested dictionaries with Megatron's description of a piece of a tensor at the leaves."""

HEAD = "output_layer.weight"
_FORMAT = ("torch_dist", 1)


class _Writer(FileSystemWriter):
    """Torch's writer, raising the system's error where torch hides it behind one of its own."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None


class InProcessSave(TorchDistSaveShardedStrategy):
    """Megatron's format, written by the rank itself instead of by processes that it starts."""

    def save(self, sharded_state_dict: Tensors, checkpoint_dir: Path) -> None:
        """Write this rank's pieces; the first rank also writes the table of contents."""
        pieces, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        save_planned(
            mcore_to_pyt_state_dict(pieces),
            storage_writer=_Writer(checkpoint_dir, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def save_role(folder: Path, role: Role, mesh: Mesh) -> None:
    """Write weights, and what the optimizer keeps of them, into an existing folder.

    All ranks call it.

    Raises:
        CheckpointException: some rank could not write; the same on all ranks.
        OSError: the first rank could not write.
    """
    if isinstance(role, TrainState):
        optimizer_state.fill_empty(role)
        tensors = _role_tensors(role, mesh, loading=False)
    else:
        tensors = _model_tensors(role, mesh)
    force_all_tensors_to_non_fp8(tensors)
    apply_factories(tensors)
    strategy: Any = InProcessSave(*_FORMAT)
    if mesh.groups.dp_cp.size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, mesh.groups.dp_cp)
    strategy.save(tensors, folder)
    if mesh.rank == 0:
        save_config(CheckpointingConfig(*_FORMAT), str(folder))


def load_role(folder: Path, role: TrainState, mesh: Mesh) -> None:
    """Restore weights, master weights and moments, at any layout. All ranks call it.

    The names must have been checked with `compare_role`. Step counters are left to the caller.
    """
    optimizer_state.fill_empty(role)
    loaded = _read(folder, _role_tensors(role, mesh, loading=True), mesh)
    _put_weights(_chunks(role), loaded)
    with torch.no_grad():
        for index, part in enumerate(optimizer_state.distributed_optimizers(role)):
            part.load_parameter_state_from_fully_reshardable(loaded["optimizer"][index])


def compare_role(
    folder: Path, role: TrainState, mesh: Mesh
) -> tuple[str | None, set[str], set[str]]:
    """Compare what this rank needs with what a folder holds, without reading tensors.

    Returns:
        The first tensor that this rank lacks with the reason, or none; the names that it needs;
        all names in the folder.
    """
    shapes = read_shapes(folder)
    optimizer_state.fill_empty(role)
    needed = _pieces(_role_tensors(role, mesh, loading=True))
    vocab_size = _vocab_size(_chunks(role))
    problems = (_mismatch(piece, shapes, vocab_size) for piece in needed)
    names = {piece.key for piece in needed}
    return next(filter(None, problems), None), names, set(shapes)


def load_weights(
    folder: Path, chunks: Sequence[StageModel], mesh: Mesh, *, absent: set[str]
) -> None:
    """Fill chunks that are not wrapped for training, at any layout. All ranks call it.

    Args:
        folder: of a role of any kind.
        chunks: this rank's chunks.
        mesh: where this rank stands.
        absent: names that keep their values, the same on all ranks.
    """
    tensors = {
        name: {key: piece for key, piece in part.items() if piece.key not in absent}
        for name, part in _model_tensors(chunks, mesh).items()
    }
    _put_weights(chunks, _read(folder, tensors, mesh))


def compare_weights(folder: Path, chunks: Sequence[StageModel], mesh: Mesh) -> dict[str, str]:
    """Return what this rank's chunks need and a folder lacks: the reason by tensor name."""
    shapes = read_shapes(folder)
    found: dict[str, str] = {}
    for piece in _pieces(_model_tensors(chunks, mesh)):
        problem = _mismatch(piece, shapes, _vocab_size(chunks))
        if problem is not None:
            found[piece.key] = problem
    return found


def bytes_to_write(role: Role, mesh: Mesh) -> int:
    """Return the bytes of the tensors of which this rank holds the copy that is written."""
    pieces = _pieces(_model_tensors(_chunks(role), mesh))
    mine = [piece.data for piece in pieces if is_main_replica(piece.replica_id)]
    # Next to the weight: a float32 master copy and two float32 moments.
    more = 12 if isinstance(role, TrainState) else 0
    return sum(tensor.numel() * (tensor.element_size() + more) for tensor in mine)


def _chunks(role: Role) -> Sequence[StageModel]:
    return [c.module for c in role.chunks] if isinstance(role, TrainState) else role


def _vocab_size(chunks: Sequence[StageModel]) -> int:
    size = chunks[0].model.vocab_size
    assert size is not None
    return size


def _sharding(mesh: Mesh) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mesh.groups.dp_cp,
    }


def _model_tensors(chunks: Sequence[StageModel], mesh: Mesh) -> Tensors:
    """Describe the parameters; leave out objects, which could only be kept as pickles."""
    return {
        f"model{index}": {
            key: piece
            for key, piece in chunk.sharded_state_dict(metadata=_sharding(mesh)).items()
            if not isinstance(piece, ShardedObject)
        }
        for index, chunk in enumerate(chunks)
    }


def _role_tensors(role: TrainState, mesh: Mesh, *, loading: bool) -> Tensors:
    models = _model_tensors(_chunks(role), mesh)
    parts = optimizer_state.distributed_optimizers(role)
    optimizer = {
        index: part.sharded_param_state_fully_reshardable(models, loading, _sharding(mesh))
        for index, part in enumerate(parts)
    }
    return {**models, "optimizer": optimizer}


def _pieces(tensors: Tensors) -> list[ShardedTensor]:
    """Return the described pieces after joined matrices were taken apart."""
    apart, _, _ = load_preprocess(tensors)
    return list(nested_values(apart))


def _mismatch(
    piece: ShardedTensor, shapes: Mapping[str, tuple[int, ...]], vocab_size: int
) -> str | None:
    """Say why a piece cannot be read from tensors of these shapes, none if it can."""
    shape, wanted = shapes.get(piece.key), tuple(piece.global_shape)
    if shape is None:
        return f"lacks the tensor {piece.key}"
    # The rows of a vocabulary are padded for the tensor-parallel size. Megatron would also cut a
    # scalar head out of a language head, which has a row for every word.
    padded = shape[1:] == wanted[1:] and min(shape[0], wanted[0]) >= vocab_size
    if shape != wanted and not (piece.allow_shape_mismatch and padded):
        return f"holds {piece.key} with shape {list(shape)} instead of {list(wanted)}"
    return None


def _read(folder: Path, tensors: Tensors, mesh: Mesh) -> Tensors:
    force_all_tensors_to_non_fp8(tensors)
    apart, _, factories = load_preprocess(tensors)
    strategy: Any = TorchDistLoadShardedStrategy()
    # Replicas share the reading. With experts their needs differ, and Megatron's exchange of what
    # a rank does not need works with CUDA only.
    if mesh.groups.dp_cp.size() > 1 and mesh.ep_size == 1:
        strategy = FullyParallelLoadStrategyWrapper(strategy, mesh.groups.dp_cp)
    with warnings.catch_warnings():
        # Megatron-Core 0.16 calls torch's loader by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        loaded: Tensors = strategy.load(apart, folder)
    return apply_factory_merges(loaded, factories)


def _put_weights(chunks: Sequence[StageModel], loaded: Tensors) -> None:
    for index, chunk in enumerate(chunks):
        weights = loaded.get(f"model{index}", {})
        for name, parameter in chunk.named_parameters():
            if name in weights and (exact := exact_value(parameter)) is not parameter:
                exact.copy_(weights[name])
        # Not strict: objects are not in checkpoints, and names were compared before.
        chunk.load_state_dict(weights, strict=False)
