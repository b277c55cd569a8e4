"""Who writes an export; the writing itself is tested with the checkpoints."""

from pathlib import Path

import pytest

from marlhf_mega.config.schema import Config
from marlhf_mega.train.export import writes_from_first

MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/home /shared nfs4 rw 0 0
/dev/vdb /shared/fast\\040disk xfs rw 0 0
store /mnt/s3 fuse.mount-s3 rw 0 0
mds@tcp:/lustre /lustre lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("target", "first"),
    [
        ("/home/run/hf", False),
        ("/shared/run/hf", True),
        ("/shared/fast disk/run/hf", False),
        ("/mnt/s3/run/hf", True),
        ("/lustre/run/hf", False),
    ],
)
def test_several_hosts_do_not_write_to_one_file_of_a_file_system_that_loses_it(
    target: str, first: bool, tmp_path: Path
) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    options = {"mounts": tmp_path / "mounts"}
    assert writes_from_first(Config(), Path(target), hosts={"a", "b"}, **options) is first
    assert writes_from_first(Config(), Path(target), hosts={"a"}, **options) is False
    asked = Config.model_validate({"checkpoint": {"export_from_first": True}})
    assert writes_from_first(asked, Path(target), hosts={"a"}, **options) is True
