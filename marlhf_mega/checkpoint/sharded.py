"""One trained model as a Megatron `torch_dist` folder: named tensors, independent of the layout."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    apply_factories,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as save_planned
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from marlhf_mega import durable
from marlhf_mega.checkpoint import optimizer_state
from marlhf_mega.checkpoint.agreement import reason
from marlhf_mega.checkpoint.in_place import read_into
from marlhf_mega.checkpoint.metadata import CONTENTS, OPTIMIZER, TensorFacts
from marlhf_mega.checkpoint.optimizer_pieces import owned_pieces
from marlhf_mega.models.fp8 import exact_value
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.collectives import agree_on_error, broadcast_from
from marlhf_mega.parallel.mesh import Group, Mesh
from marlhf_mega.platform.host_memory import HostCopies

Saveable = TrainState | Sequence[StageModel]
"""A model with its optimizer, or only its weights."""
Tensors = dict[str, Any]
"""Nested dictionaries of Megatron's descriptions of pieces of tensors."""

HEAD = "output_layer.weight"
TABLES = (CONTENTS, CONFIG_FNAME)
"""Files beside those of the ranks."""
_FORMAT = ("torch_dist", 1)


class Staged(FileSystemWriter):
    """The save of one model in two parts: torch only plans it, and it is written later.

    `write` writes this rank's file, at any time and on any thread. `write_tables` on the first rank
    then adds the tables that make the ranks' files a checkpoint.
    """

    def __init__(self, folder: Path, *, copy: HostCopies | None) -> None:
        """Set the existing folder, and what makes the copies in host memory that are written.

        With copies, the model may change before `write`.
        """
        # Torch would copy from a GPU on the writing thread, with that thread's default device.
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0 if copy else 10_000_000)
        self.folder = folder
        self._copy = copy
        self._plan: SavePlan | None = None
        self._metadata: Metadata | None = None
        self._data: dict[MetadataIndex, Tensor] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Record what to write."""
        self._plan = plan
        tensors = [_tensor_of(planner, item) for item in plan.items]
        if self._copy is not None:
            tensors = self._copy(tensors)
        self._data = dict(zip([item.index for item in plan.items], tensors, strict=True))
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Record the table of contents on the first rank, still without the tensors' places."""
        self._metadata = metadata

    def write(self) -> list[WriteResult]:
        """Write this rank's files; return where in them the tensors are.

        Raises:
            OSError: the system's error, even where torch wraps it in one of its own.
        """
        try:
            return self._write_file(of_optimizer=False) + self._write_file(of_optimizer=True)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None
        finally:
            self._data.clear()

    def _write_file(self, *, of_optimizer: bool) -> list[WriteResult]:
        """Write the optimizer's tensors or the others, so that weights can be verified alone."""
        assert self._plan is not None
        items = [
            item
            for item in self._plan.items
            if item.index.fqn.startswith(OPTIMIZER) == of_optimizer
        ]
        if not items:
            return []
        prefix = self._plan.storage_data.prefix + ("optimizer_" if of_optimizer else "")
        plan = replace(self._plan, items=items, storage_data=_StoragePrefix(prefix))
        return super().write_data(plan, _Recorded(self._data)).value()

    def write_tables(self, results: list[list[WriteResult]]) -> list[Path]:
        """Write the files that readers need besides those of the ranks; return their paths.

        The first rank calls it with the results of `write` on all ranks.
        """
        assert self._metadata is not None
        super().finish(self._metadata, results)
        save_config(CheckpointingConfig(*_FORMAT), str(self.folder))
        tables = [self.folder / CONTENTS, self.folder / CONFIG_FNAME]
        durable.sync(tables[1])
        return tables


def _tensor_of(planner: SavePlanner, item: WriteItem) -> Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor), item
    return tensor


class _Recorded(DefaultSavePlanner):
    """Gives torch's writer the recorded tensors."""

    def __init__(self, data: Mapping[MetadataIndex, Tensor]) -> None:
        super().__init__()
        self._data = data

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the tensor of an item in the plan."""
        return self._data[write_item.index]


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's format, written by the rank itself instead of by child processes."""

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


def stage_role(folder: Path, role: Saveable, mesh: Mesh, *, copy: HostCopies | None) -> Staged:
    """Plan to write weights, and optimizer state if there is any, to an existing folder.

    All ranks call it.

    Args:
        folder: the model's folder.
        role: the model.
        mesh: this rank's mesh.
        copy: copies to host memory; without, the model must not change before it is written.

    Raises:
        CheckpointException: planning failed on some rank; the same on all ranks.
    """
    tensors = _tensors(role, mesh)
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

    A rank reads the optimizer state that it owns and a share of the weights that it replicates.
    Call `compare_role` first to check the names. The caller restores step counters.
    """
    optimizer_state.fill_empty(role)
    models = _model_tensors(_chunks(role), mesh)
    _read(folder, models, _chunks(role), mesh, owned=_owned(role, models))


def compare_role(
    table: Mapping[str, TensorFacts], role: Saveable, mesh: Mesh
) -> tuple[str | None, set[str]]:
    """Compare the tensors that this rank needs with those in a table of contents.

    Returns:
        Why the first missing tensor cannot be read, or None; the names that this rank needs.
    """
    needed = _pieces(_tensors(role, mesh))
    vocab_size = _chunks(role)[0].model.vocab_size or 0
    problems = (_mismatch(piece, table, vocab_size) for piece in needed)
    return next(filter(None, problems), None), {piece.key for piece in needed}


def load_chunks(
    folder: Path, chunks: Sequence[StageModel], mesh: Mesh, *, absent: set[str]
) -> None:
    """Fill chunks that are not wrapped for training, at any layout. All ranks call it.

    Args:
        folder: a model's folder.
        chunks: this rank's chunks.
        mesh: this rank's mesh.
        absent: names of tensors that keep their values, the same on all ranks.
    """
    tensors = {
        name: {key: piece for key, piece in part.items() if piece.key not in absent}
        for name, part in _model_tensors(chunks, mesh).items()
    }
    _read(folder, tensors, chunks, mesh)


def compare_weights(
    table: Mapping[str, TensorFacts], chunks: Sequence[StageModel], mesh: Mesh
) -> dict[str, str]:
    """Return why tensors that this rank needs cannot be read, by name.

    Args:
        table: of contents of a model's folder.
        chunks: this rank's chunks.
        mesh: this rank's mesh.
    """
    found: dict[str, str] = {}
    for piece in _pieces(_model_tensors(chunks, mesh)):
        problem = _mismatch(piece, table, chunks[0].model.vocab_size or 0)
        if problem is not None:
            found[piece.key] = problem
    return found


def files_of_weights(table: Mapping[str, TensorFacts]) -> set[str]:
    """Return the names of the files that hold a model's weights; optimizer states have others."""
    weights = [facts.files for key, facts in table.items() if not key.startswith(OPTIMIZER)]
    return set().union(*weights)


def bytes_to_write(role: Saveable, mesh: Mesh) -> int:
    """Return the bytes that this rank writes."""
    pieces = _pieces(_model_tensors(_chunks(role), mesh))
    mine = [piece.data for piece in pieces if is_main_replica(piece.replica_id)]
    # Besides the weight: a float32 master copy and two float32 moments.
    more = 12 if isinstance(role, TrainState) else 0
    return sum(tensor.numel() * (tensor.element_size() + more) for tensor in mine)


def _chunks(role: Saveable) -> Sequence[StageModel]:
    return [c.module for c in role.chunks] if isinstance(role, TrainState) else role


def _sharding(mesh: Mesh) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": mesh.groups.dp_cp,
    }


def _model_tensors(chunks: Sequence[StageModel], mesh: Mesh) -> Tensors:
    """Describe the parameters; leave out objects, which could only be saved as pickles."""
    return {
        f"model{index}": {
            key: piece
            for key, piece in chunk.sharded_state_dict(metadata=_sharding(mesh)).items()
            if not isinstance(piece, ShardedObject)
        }
        for index, chunk in enumerate(chunks)
    }


def _tensors(role: Saveable, mesh: Mesh) -> Tensors:
    models = _model_tensors(_chunks(role), mesh)
    if not isinstance(role, TrainState):
        return models
    optimizer_state.fill_empty(role)
    return {**models, "optimizer": _owned(role, models)}


def _owned(role: TrainState, models: Tensors) -> list[ShardedTensor]:
    """Describe this rank's optimizer state; Megatron's own description is of all replicas'."""
    return [piece for part in role.optimizers() for piece in owned_pieces(part, models)]


def _pieces(tensors: Tensors) -> list[ShardedTensor]:
    """Return all pieces, those of fused matrices one by one."""
    sharded, _, _ = load_preprocess(tensors)
    return list(nested_values(sharded))


def _mismatch(
    piece: ShardedTensor, table: Mapping[str, TensorFacts], vocab_size: int
) -> str | None:
    """Return why a piece cannot be read from the tensors of a table; None if it can."""
    if piece.key not in table:
        return f"lacks the tensor {piece.key}"
    shape, wanted = table[piece.key].shape, tuple(piece.global_shape)
    # The vocabulary is padded for the tensor-parallel size. Megatron would also read a scalar head
    # from a language head, which has a row for every token.
    padded = shape[1:] == wanted[1:] and min(shape[0], wanted[0]) >= vocab_size
    if shape != wanted and not (piece.allow_shape_mismatch and padded):
        return f"holds {piece.key} with shape {list(shape)} instead of {list(wanted)}"
    return None


def _read(
    folder: Path,
    models: Tensors,
    chunks: Sequence[StageModel],
    mesh: Mesh,
    *,
    owned: Sequence[ShardedTensor] = (),
) -> None:
    """Fill weights, and pieces that no other rank holds. All ranks call it.

    Args:
        folder: of a role.
        models: what `_model_tensors` returned for the chunks, or a part of it.
        chunks: this rank's chunks.
        mesh: this rank's mesh.
        owned: more to read.

    Raises:
        RuntimeError: some rank could not read; the same on all ranks.
    """
    force_all_tensors_to_non_fp8(models)
    weights = [
        (piece.data, _pieces({"": piece}), replicas_of(name, mesh))
        for part in models.values()
        for name, piece in part.items()
    ]
    shared = [
        piece
        for number, (_, pieces, replicas) in enumerate(weights)
        if number % replicas.size() == replicas.rank()
        for piece in pieces
    ]
    problem = None
    try:
        read_into(folder, [*owned, *shared])
    except (OSError, RuntimeError) as error:
        problem = f"rank {mesh.rank}: {reason(error)}"
    problem = agree_on_error(problem)
    if problem is not None:
        raise RuntimeError(f"{folder}: must be readable; {problem}. Use another checkpoint.")
    for number, (weight, _, replicas) in enumerate(weights):
        broadcast_from(number % replicas.size(), weight.detach(), replicas)
    values = {part: {n: p.data for n, p in pieces.items()} for part, pieces in models.items()}
    _put_weights(chunks, values)


def replicas_of(name: str, mesh: Mesh) -> Group:
    """Return the ranks that hold the same part of a parameter."""
    return mesh.groups.expt_dp if ".mlp.experts." in name else mesh.groups.dp_cp


def _put_weights(chunks: Sequence[StageModel], loaded: Tensors) -> None:
    for index, chunk in enumerate(chunks):
        weights = loaded.get(f"model{index}", {})
        for name, parameter in chunk.named_parameters():
            if name in weights and (exact := exact_value(parameter)) is not parameter:
                exact.copy_(weights[name])
        # Not strict, because checkpoints have no objects; names were compared before.
        chunk.load_state_dict(weights, strict=False)
