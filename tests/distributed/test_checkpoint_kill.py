"""A save that is killed at any point leaves the previous or the new checkpoint, never a mixture."""

import pytest

from tests.distributed.ranks import run_ranks

WHERE = ["", " in the background"]
CASES = [f"{case}{where}" for case in ("next step", "same step") for where in WHERE]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill")
    return run_ranks("checkpoint_kill_ranks.py", 1, root / "out.json", str(root))


@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_file_operation_the_old_or_the_new_checkpoint_loads(found, case):
    results = found[case]["results"]
    for point, died, weights, marker, _, _ in results:
        assert weights == marker, (point, found[case]["log"][point : point + 1])
        assert weights in ("old", "new")
        assert died == (point < len(found[case]["log"]))
    markers = [marker for _, _, _, marker, _, _ in results]
    assert markers == sorted(markers, reverse=True), "once the new one loads, it stays"
    assert set(markers) == {"old", "new"}


@pytest.mark.parametrize("case", CASES)
def test_all_kinds_of_file_operations_were_hit(found, case):
    log = found[case]["log"]
    assert {line.split()[0] for line in log} >= {"mkdir", "open", "fsync", "rename", "replace"}
    assert any(".distcp" in line for line in log)
    assert any("manifest.json" in line for line in log)
    assert any(line.startswith("replace") and line.endswith("latest.tmp") for line in log)
    assert any(line.startswith("unlink") for line in log), "retention"
    assert len(log) > 20


@pytest.mark.parametrize("where", WHERE)
def test_the_next_save_removes_what_a_killed_one_left(found, where):
    for *_, left in found[f"next step{where}"]["results"]:
        assert left[0] == "latest"
        assert left[-1] == "step_000004"
        assert len(left) == 3
    for *_, left in found[f"same step{where}"]["results"]:
        assert left == ["latest", "step_000003"]
