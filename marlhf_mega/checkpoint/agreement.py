"""File operations that succeed or fail on all ranks together, and their errors in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from torch.distributed.checkpoint.api import CheckpointException

from marlhf_mega.parallel.collectives import agree_on_error
from marlhf_mega.parallel.mesh import Mesh

T = TypeVar("T")


class Together:
    """The steps of a save. All ranks call the same methods in the same order."""

    def __init__(self, target: Path, mesh: Mesh, *, give_up: Callable[[], None]) -> None:
        """Set the folder that errors name, and what the first rank does after a failure."""
        self._target, self._mesh, self._give_up = target, mesh, give_up

    def on_first(self, work: Callable[[], None]) -> None:
        """Run `work` on the first rank while the others wait; raises like `on_all`."""
        self.on_all(work if self._mesh.rank == 0 else lambda: None)

    def on_all(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank.

        Raises:
            RuntimeError: it failed on some rank; the same error on all ranks.
        """
        problem: BaseException | None = None
        result, message = None, None
        try:
            result = work()
        except (OSError, RuntimeError) as error:
            problem, message = error, f"rank {self._mesh.rank}: {reason(error)}"
        except CheckpointException as error:
            problem, message = error, reason(error)
        failed = agree_on_error(message)
        if failed is None:
            return cast(T, result)
        if self._mesh.rank == 0:
            self._give_up()
        raise RuntimeError(
            f"{self._target}: could not be written; {failed}. Fix the disk or free space; earlier "
            "checkpoints are intact."
        ) from problem


def reason(error: BaseException) -> str:
    """Return in one line why torch could not write or read; its own message has tracebacks."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = min(error.failures.items())
        return f"rank {rank}: {reason(inner)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}".splitlines()[0]
