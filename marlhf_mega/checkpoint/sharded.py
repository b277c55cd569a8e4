"""One trained role as a Megatron `torch_dist` folder: named tensors, independent of the layout."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, save_config
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
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as save_planned
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from marlhf_mega.checkpoint import durable, optimizer_state
from marlhf_mega.checkpoint.metadata import FILE as CONTENTS
from marlhf_mega.checkpoint.metadata import read_shapes
from marlhf_mega.checkpoint.optimizer_pieces import owned_pieces
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


class Staged(FileSystemWriter):
    """One role's save in two parts: torch plans it, and what this rank shall write is noted.

    Then `write` writes this rank's file, at any time and on any thread, and the first rank's
    `write_tables` adds what makes a checkpoint of all ranks' files.
    """

    def __init__(self, folder: Path, *, copy: bool) -> None:
        """Take an existing folder; a copy in host memory is not touched by what comes after."""
        # Torch would copy from a GPU on the thread that writes, with that thread's default device.
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0 if copy else 10_000_000)
        self.folder = folder
        self._copy = copy
        self._plan: SavePlan | None = None
        self._metadata: Metadata | None = None
        self._data: dict[MetadataIndex, Tensor] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Note what is to be written."""
        self._plan = plan
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor), item
            self._data[item.index] = tensor.detach().to("cpu", copy=True) if self._copy else tensor
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Note the table of contents, on the first rank, but for where the tensors will be."""
        self._metadata = metadata

    def write(self) -> list[WriteResult]:
        """Write this rank's file; returns where in it the tensors are.

        Raises:
            OSError: the system's error, where torch hides it behind one of its own.
        """
        assert self._plan is not None
        if not self._plan.items:
            return []
        try:
            return super().write_data(self._plan, _Noted(self._data)).value()
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None
        finally:
            self._data.clear()

    def write_tables(self, results: list[list[WriteResult]]) -> list[Path]:
        """Write what readers need besides the ranks' files, and return the paths.

        The first rank calls it with what `write` returned on all ranks.
        """
        assert self._metadata is not None
        super().finish(self._metadata, results)
        save_config(CheckpointingConfig(*_FORMAT), str(self.folder))
        tables = [self.folder / CONTENTS, self.folder / CONFIG_FNAME]
        durable.sync(tables[1])
        return tables


class _Noted(DefaultSavePlanner):
    """Gives torch's writer what was noted."""

    def __init__(self, data: Mapping[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._data = data

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the tensor of an item of the plan."""
        return self._data[write_item.index]


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's format, written by the rank itself instead of by processes that it starts."""

    def __init__(self, writer: Staged) -> None:
        super().__init__(*_FORMAT)
        self._writer = writer

    def save(self, sharded_state_dict: Tensors, checkpoint_dir: Path) -> None:
        """Plan who writes what."""
        pieces, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        save_planned(
            mcore_to_pyt_state_dict(pieces),
            storage_writer=self._writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def stage_role(folder: Path, role: Role, mesh: Mesh, *, copy: bool) -> Staged:
    """Plan to write weights, and what the optimizer keeps of them, into an existing folder.

    All ranks call it.

    Args:
        folder: of the role.
        role: what is written.
        mesh: where this rank stands.
        copy: into host memory; else the role must not change before it is written.

    Raises:
        CheckpointException: some rank could not plan; the same on all ranks.
    """
    if isinstance(role, TrainState):
        optimizer_state.fill_empty(role)
        tensors = _role_tensors(role, mesh, loading=False)
    else:
        tensors = _model_tensors(role, mesh)
    force_all_tensors_to_non_fp8(tensors)
    apply_factories(tensors)
    staged = Staged(folder, copy=copy)
    strategy: Any = _Plan(staged)
    if mesh.groups.dp_cp.size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, mesh.groups.dp_cp)
    strategy.save(tensors, folder)
    return staged


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
    parts = dict(enumerate(optimizer_state.distributed_optimizers(role)))
    if not loading:
        # Megatron's own description would gather the state of all replicas on each of them.
        pieces = {index: owned_pieces(part, models) for index, part in parts.items()}
        return {**models, "optimizer": pieces}
    optimizer = {
        index: part.sharded_param_state_fully_reshardable(models, True, _sharding(mesh))
        for index, part in parts.items()
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
