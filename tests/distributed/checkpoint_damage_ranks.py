"""Damage, malice and full disks on two ranks; every case works on a copy of one good run."""

import json
import logging
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from marlhf_mega.checkpoint import manifest, saver, sharded, store
from marlhf_mega.config.sections.hardware import ParallelConfig
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from tests.distributed import checkpoint_model as tiny

STATE = {"kl_coef": 0.1}


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []
        logging.getLogger("marlhf_mega").addHandler(self)

    def emit(self, record):
        self.texts.append(record.getMessage())


class Malice:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Case:
    """Copies of the good run, changed by the first rank."""

    def __init__(self, good, mesh):
        self.good, self.mesh, self.count = good, mesh, 0

    def copy(self, change):
        run = self.good.with_name(f"case{self.count}")
        self.count += 1
        if self.mesh.rank == 0:
            shutil.copytree(self.good, run)
            change(run / "checkpoints")
        dist.barrier()
        return run

    def find(self, change):
        """Return what `find` returns after a change, and its warnings on all ranks."""
        run, seen = self.copy(change), Warnings()
        try:
            name = store.find(run, self.mesh).name
        except RuntimeError as error:
            name = str(error)
        every = [None, None]
        dist.all_gather_object(every, seen.texts)
        return {"name": name, "warnings": every[0] + every[1]}


def damage(path, kind):
    data = path.read_bytes()
    if kind == "flip":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif kind == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()


def damaged(case):
    newest = case.good / "checkpoints" / "step_000004"
    names = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())
    return {
        f"{name} {kind}": case.find(
            lambda root, n=name, k=kind: damage(root / "step_000004" / n, k)
        )
        for name in names
        for kind in ("flip", "truncate", "remove")
    }


def pointers(case):
    def write(text):
        return lambda root: (root / "latest").write_bytes(text)

    def both(root):
        damage(root / "step_000002" / "state.json", "flip")
        damage(root / "step_000004" / "policy" / ".metadata", "remove")

    return {
        "garbage": case.find(write(b"\xff\x00\n../../etc")),
        "empty": case.find(write(b"")),
        "absent": case.find(write(b"step_000009\n")),
        "removed": case.find(lambda root: (root / "latest").unlink()),
        "rolled back": case.find(write(b"step_000002\n")),
        "all damaged": case.find(both),
    }


def removed_meanwhile(case, mesh):
    """A run that goes on replaces all it has while another program looks for a checkpoint."""
    original = manifest.find_damage

    def late(folder, share):
        root = folder.parent
        if mesh.rank == 0 and not (root / "step_000006").exists():
            shutil.rmtree(root / "step_000002")
            (root / "step_000004").rename(root / "step_000006")
            (root / "latest").write_text("step_000006\n")
        dist.barrier()
        return original(folder, share)

    manifest.find_damage = late
    found = case.find(lambda root: None)
    manifest.find_damage = original
    return found


def forge(root, change):
    """Change the table of the newest policy as one would who can also write the manifest."""
    folder = root / "step_000004"
    path = folder / "policy" / ".metadata"
    path.write_bytes(pickle.dumps(change(pickle.loads(path.read_bytes()))))
    files = {n: manifest.facts(folder / n) for n in manifest.read(folder)["files"]}
    (folder / manifest.FILE).write_text(manifest.make(files))


def malicious(case, mesh):
    marker = case.good.with_name("executed")

    def as_bytes(table):
        name = next(iter(table.state_dict_metadata))
        table.state_dict_metadata[name] = BytesStorageMetadata()
        return table

    def elsewhere(table):
        next(iter(table.storage_data.values())).relative_path = "../../latest"
        return table

    found = {}
    for name, change in (
        ("code", lambda table: Malice(marker)),
        ("object", as_bytes),
        ("path", elsewhere),
    ):
        run = case.copy(lambda root, c=change: forge(root, c))
        role, chunks = tiny.make_role(mesh), tiny.make_chunks(mesh)
        folder = store.find(run, mesh)
        found[name] = [
            folder.name,
            message(lambda f=folder, r=role: store.load(f, {"policy": r}, mesh)),
            message(lambda r=run, c=chunks: store.load_weights(r, c, mesh)),
        ]
    found["executed"] = marker.exists()
    return found


def message(action):
    """What an action is refused with, on every rank."""
    try:
        action()
        text = "not refused"
    except RuntimeError as error:
        text = str(error)
    every = [None, None]
    dist.all_gather_object(every, text)
    return every


def until_committed(writer, run):
    """Take steps, as it were, until the save in progress is committed or has failed."""
    for _ in range(1000):
        writer.poll()
        if (run / "checkpoints" / "latest").read_text() == "step_000006\n":
            return
        time.sleep(0.01)
    raise AssertionError


def failing(case, mesh, role):
    """Saves that cannot be finished: the messages and what is left."""
    found = {}

    def attempt(name, run, background=False):
        writer = saver.Saver(run, mesh, keep=1, background=background)
        begun = message(lambda: writer.save(6, {"policy": role}, STATE))
        found[name] = {
            "messages": message(lambda: until_committed(writer, run)) if background else begun,
            "left": sorted(p.name for p in (run / "checkpoints").glob("*")),
        }
        if background:
            assert begun == ["not refused"] * 2
        latest = store.find(run, mesh)
        found[name]["latest"] = latest and latest.name

    run = case.copy(lambda root: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    attempt("disk fills on rank 1", run)
    attempt("disk fills on rank 1 in the background", run, background=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    original = sharded.stage_role

    def vanish(folder, *arguments, **options):
        staged = original(folder, *arguments, **options)
        if mesh.rank == 0:
            shutil.rmtree(folder.parent)
        dist.barrier()
        return staged

    sharded.stage_role = vanish
    attempt("folder vanishes", case.copy(lambda root: None))
    other = case.copy(lambda root: None)
    attempt("folder vanishes in the background", other, background=True)
    sharded.stage_role = original

    small = case.good.with_name("small")
    mounted = False
    if mesh.rank == 0:
        small.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    every = [None, None]
    dist.all_gather_object(every, mounted)
    if every[0]:
        try:
            attempt("small disk", small / "run")
            if mesh.rank == 0:
                subprocess.run(["mount", "-o", "remount,ro,size=64m", str(small)], check=True)
            dist.barrier()
            found["read-only"] = {
                "start": message(lambda: saver.check_writable(small / "run", mesh)),
                "save": message(
                    lambda: saver.save(small / "run", 6, {"policy": role}, STATE, mesh, keep=1)
                ),
            }
        finally:
            dist.barrier()
            if mesh.rank == 0:
                subprocess.run(["umount", str(small)], check=True)
    file = case.good.with_name("file")
    if mesh.rank == 0:
        file.write_text("in the way")
    dist.barrier()
    found["in the way"] = message(lambda: saver.check_writable(file / "run", mesh))
    found["good folder"] = message(lambda: saver.check_writable(run, mesh))
    attempt("fixed", run)
    attempt("fixed in the background", other, background=True)
    return found


def main():
    out, root = Path(sys.argv[1]), Path(sys.argv[2])
    mesh = create_mesh(ParallelConfig(tensor_size=2))
    policy, critic = tiny.make_role(mesh), tiny.make_role(mesh, head="scalar")
    good = root / "good"
    for step in (2, 4):
        tiny.train(policy, mesh, [step])
        saver.save(good, step, {"policy": policy, "critic": critic}, STATE, mesh, keep=2)
    case = Case(good, mesh)
    found = {
        "damaged": damaged(case),
        "pointers": pointers(case),
        "removed meanwhile": removed_meanwhile(case, mesh),
        "malicious": malicious(case, mesh),
        "failing": failing(case, mesh, policy),
    }
    if mesh.rank == 0:
        out.write_text(json.dumps(found))
    destroy_mesh()


if __name__ == "__main__":
    main()
