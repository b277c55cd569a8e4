"""The error of a failed save: the cause on the first rank that failed, in one line."""

import errno

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from marlhf_mega.checkpoint.agreement import Together, reason
from marlhf_mega.config.sections.hardware import ParallelConfig
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh


def failed(*errors):
    return CheckpointException("many lines", {rank: (error, None) for rank, error in errors})


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "No space left on device (/x)"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("odd"), "OSError: odd"),
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
        (failed((3, KeyError("c")), (1, OSError(errno.EIO, "I/O error"))), "rank 1: I/O error"),
        (failed((2, failed((5, ValueError("bad"))))), "rank 2: rank 5: ValueError: bad"),
    ],
)
def test_a_cause_is_one_line(error, line):
    assert reason(error) == line


@pytest.fixture
def together(tmp_path):
    given_up = []
    mesh = create_mesh(ParallelConfig())
    yield Together(tmp_path, mesh, give_up=lambda: given_up.append(True)), given_up
    destroy_mesh()


def test_work_that_succeeds_gives_its_result(together):
    step, given_up = together
    done = []
    assert step.on_all(lambda: 7) == 7
    step.on_first(lambda: done.append(1))
    assert (done, given_up) == ([1], [])


def test_failed_work_is_cleaned_up_and_the_error_has_its_cause(together, tmp_path):
    step, given_up = together
    full = OSError(errno.ENOSPC, "No space left on device", "/x")

    def work():
        raise full

    with pytest.raises(RuntimeError) as caught:
        step.on_first(work)
    assert str(caught.value) == (
        f"{tmp_path}: could not be written; rank 0: No space left on device (/x). Fix the disk or "
        "free space; earlier checkpoints are intact."
    )
    assert caught.value.__cause__ is full
    assert given_up == [True]


def test_programming_errors_pass_through(together):
    step, given_up = together
    with pytest.raises(KeyError):
        step.on_all(lambda: {}["gone"])
    assert given_up == []
