"""A save is killed before each of its file operations in turn; then the run is resumed."""

import builtins
import io
import json
import os
import shutil
import stat
import sys
from functools import partial
from pathlib import Path

from marlhf_mega.checkpoint import saver, store
from marlhf_mega.config.sections.hardware import ParallelConfig
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from tests.distributed import checkpoint_model as tiny


def make_role(mesh, **options):
    """Return a model of one layer: a checkpoint has the same files, with fewer tensors in them."""
    return tiny.make_role(mesh, num_layers=1, **options)


class Killed(BaseException):
    pass


class FileOperations:
    """Counts what changes the disk; from operation `dies_at` on nothing changes any more."""

    NAMES = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")

    def __init__(self, dies_at=None):
        self.dies_at, self.log = dies_at, []

    def __enter__(self):
        self.originals = {name: getattr(os, name) for name in self.NAMES}
        self.open = builtins.open
        for name in self.NAMES:
            setattr(os, name, self._guarded(name, self.originals[name]))
        builtins.open = io.open = self._guarded_open
        return self

    def __exit__(self, *error):
        for name, original in self.originals.items():
            setattr(os, name, original)
        builtins.open = io.open = self.open

    def _count(self, name, argument):
        if self.dies_at is not None and len(self.log) >= self.dies_at:
            if name == "fsync" and len(self.log) == self.dies_at:
                lose_half(argument)
            self.log.append("dead")
            raise Killed
        self.log.append(f"{name} {argument}")

    def _guarded(self, name, original):
        def operation(*arguments, **options):
            self._count(name, arguments[0])
            return original(*arguments, **options)

        return operation

    def _guarded_open(self, file, mode="r", *arguments, **options):
        if set(mode) & set("wxa+"):
            self._count("open", file)
        return self.open(file, mode, *arguments, **options)


def lose_half(descriptor):
    """What was not flushed when the machine went down may be gone."""
    facts = os.fstat(descriptor)
    if stat.S_ISREG(facts.st_mode):
        os.truncate(f"/proc/self/fd/{descriptor}", facts.st_size // 2)


def survive(prepared, work, mesh, *, step, role, keep, background):
    """Kill `save(step)` everywhere on copies of `prepared`; return what a resume finds."""
    old, new = make_role(mesh, seed=99), role
    before = store.find(prepared, mesh)
    store.load(before, {"policy": old}, mesh)
    known = {tiny.digests(old)[0]: "old", tiny.digests(new)[0]: "new"}

    def save(run, number):
        name = known[tiny.digests(new)[0]]
        writer = saver.Saver(run, mesh, keep=keep, background=background)
        writer.save(number, {"policy": new}, {"marker": name})
        writer.finish()

    run = work / "whole"
    shutil.copytree(prepared, run)
    with FileOperations() as whole:
        save(run, step)
    results = []
    for point in range(len(whole.log) + 1):
        run = work / f"killed{point}"
        shutil.copytree(prepared, run)
        died = False
        with FileOperations(dies_at=point):
            try:
                save(run, step)
            except Killed:
                died = True
        resumed = make_role(mesh, seed=98)
        found = store.find(run, mesh)
        state = store.load(found, {"policy": resumed}, mesh)
        weights = known.get(tiny.digests(resumed)[0], "mixture")
        save(run, step + 1)
        left = sorted(p.name for p in (run / "checkpoints").iterdir())
        results.append([point, died, weights, state["marker"], found.name, left])
        shutil.rmtree(run)
    return {"log": whole.log, "results": results}


def main():
    out, root = Path(sys.argv[1]), Path(sys.argv[2])
    mesh = create_mesh(ParallelConfig())
    role = make_role(mesh)
    first, two = root / "first", root / "two"
    tiny.train(role, mesh, [0])
    saver.save(two, 1, {"policy": role}, {"marker": "older"}, mesh, keep=2)
    tiny.train(role, mesh, [1])
    for run in (first, two):
        saver.save(run, 2, {"policy": role}, {"marker": "old"}, mesh, keep=2)
    tiny.train(role, mesh, [2])
    found = {}
    for where in ("", " in the background"):
        survivors = partial(survive, mesh=mesh, role=role, background=bool(where))
        found[f"next step{where}"] = survivors(two, root / f"a{where}", step=3, keep=2)
        found[f"same step{where}"] = survivors(first, root / f"b{where}", step=2, keep=1)
    out.write_text(json.dumps(found))
    destroy_mesh()


if __name__ == "__main__":
    main()
