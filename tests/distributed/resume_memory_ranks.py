"""Two ranks: peak host memory of resumes and exports, what is hashed, and tokens that are late."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from marlhf_mega.checkpoint import manifest, optimizer_state, saver, sharded, store, weights
from marlhf_mega.checkpoint.hf import exporter
from marlhf_mega.checkpoint.hf.parameters import local_parameters
from marlhf_mega.checkpoint.hf.side_files import SideFiles
from marlhf_mega.config.sections.hardware import ParallelConfig
from marlhf_mega.parallel.collectives import share_sampled
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from tests.distributed import checkpoint_model as tiny

SIZES = {
    "num_layers": 6,
    "hidden_size": 256,
    "ffn_hidden_size": 1024,
    "vocab_size": 6000,
    "num_attention_heads": 8,
    "num_query_groups": 8,
}


def status(key):
    """A number of bytes from what the kernel knows of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def held(role):
    """Bytes of this rank's weights, master weights and moments."""
    tensors = [p for chunk in role.chunks for p in chunk.parameters()]
    for part in role.optimizers():
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                states = part.optimizer.state[parameter]
                tensors += [parameter, *(states[name] for name in ("exp_avg", "exp_avg_sq"))]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def save(run, layout):
    mesh = create_mesh(ParallelConfig(**layout))
    role = tiny.make_role(mesh, **SIZES)
    optimizer_state.fill_empty(role)
    saver.save(run, 1, {"policy": role}, {}, mesh, keep=1)
    destroy_mesh(leave_world=False)


def load(run, layout):
    """Bytes that a rank holds for good, and what loading took in addition at its peak."""
    mesh = create_mesh(ParallelConfig(**layout))
    role = tiny.make_role(mesh, seed=2, **SIZES)
    optimizer_state.fill_empty(role)
    for part in role.optimizers():
        for state in part.optimizer.state.values():
            for tensor in state.values():
                tensor.fill_(1.0)  # zeros take no memory until they are written to
    folder = store.find(run, mesh)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held now
    before = status("VmRSS")
    store.load(folder, {"policy": role}, mesh)
    found = [held(role), status("VmHWM") - before]
    every = [None] * mesh.world_size
    dist.all_gather_object(every, found)
    destroy_mesh(leave_world=False)
    return every


def hashed(run):
    """Bytes that all ranks hash to load a policy's weights, and those of the weights."""
    mesh = create_mesh(ParallelConfig())
    role = tiny.make_role(mesh, **SIZES)
    saver.save(run, 1, {"policy": role, "critic": role}, {}, mesh, keep=1)
    chunks = tiny.make_chunks(mesh, seed=2, **SIZES)
    original, sizes = manifest.facts, {}

    def note(path):
        found = original(path)
        sizes[str(path)] = found["bytes"]
        return found

    manifest.facts = note
    store.load_weights(run, chunks, mesh)
    manifest.facts = original
    every = [None] * mesh.world_size
    dist.all_gather_object(every, sizes)
    held = sum(p.numel() * 4 for p in chunks[0].parameters())
    destroy_mesh(leave_world=False)
    return [sum({**every[0], **every[1]}.values()), held]


def exported(target, *, gathered):
    """Bytes of the largest tensor, and what an export at TP2 took on every rank at its peak."""
    mesh = create_mesh(ParallelConfig(tensor_size=2))
    sizes = SIZES | {"vocab_size": 60_000, "ffn_hidden_size": 16_384, "num_layers": 1}
    chunks = tiny.make_chunks(mesh, tied=True, qkv_bias=False, **sizes)
    exporter.BLOCK_BYTES = 2**21
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    exporter.export_weights(
        target,
        local_parameters(chunks),
        weights.table_of(chunks),
        weights.layout_of(mesh, chunks[0].model),
        dtype=torch.float32,
        side_files=SideFiles(),
        peers=exporter.Peers(mesh),
        tensor_peers=exporter.Peers(mesh, mesh.groups.tp),
        gathered=gathered,
    )
    every = [None] * mesh.world_size
    dist.all_gather_object(every, status("VmHWM") - before)
    destroy_mesh(leave_world=False)
    return [60_000 * 256 * 4, every]


def old(run, disk):
    """A checkpoint as it once was, one file per rank and role, on a disk that a link leads to.

    Returns whether a resume and a load of weights gave the saved model back, the files of rank 0,
    and the folders whose free space was asked for.
    """
    mesh = create_mesh(ParallelConfig())
    if mesh.rank == 0:
        disk.mkdir()
        run.mkdir()
        (run / "checkpoints").symlink_to(disk)
    dist.barrier()
    writer, usage, asked = sharded.Staged._write_file, saver.shutil.disk_usage, []

    def write_file(staged, *, of_optimizer):
        recorded = sharded._Recorded(staged._data)
        whole = super(sharded.Staged, staged).write_data
        return [] if of_optimizer else whole(staged._plan, recorded).value()

    def disk_usage(path):
        asked.append(str(path))
        return usage(path)

    sharded.Staged._write_file, saver.shutil.disk_usage = write_file, disk_usage
    role = tiny.make_role(mesh)
    tiny.train(role, mesh, range(2))
    folder = saver.save(run, 2, {"policy": role}, {}, mesh, keep=1)
    sharded.Staged._write_file, saver.shutil.disk_usage = writer, usage
    resumed = tiny.make_role(mesh, seed=2)
    store.load(store.find(run, mesh), {"policy": resumed}, mesh)
    chunks = tiny.make_chunks(mesh, seed=3)
    store.load_weights(run, chunks, mesh)
    pairs = zip(role.chunks[0].module.parameters(), chunks[0].parameters(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    equal = [tiny.digests(role) == tiny.digests(resumed), same]
    files = sorted(path.name for path in (folder / "policy").glob("__0_*"))
    destroy_mesh(leave_world=False)
    return equal, files, sorted(set(asked))


def late():
    """What the first stage says when the last one does not send the sampled tokens in time."""
    mesh = create_mesh(ParallelConfig(pipeline_size=2), timeout_seconds=10.0)
    problem = None
    if mesh.is_first_stage:
        try:
            share_sampled(torch.zeros(2), mesh)
        except RuntimeError as error:
            problem = str(error)
    dist.barrier()
    destroy_mesh(leave_world=False)
    return problem


def main():
    out, root, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    found = {}
    for number, (name, (saved_at, loaded_at)) in enumerate(cases.items()):
        save(root / str(number), saved_at)
        found[name] = load(root / str(number), loaded_at)
    found["hashed"] = hashed(root / "hashed")
    found["exported"] = [exported(root / f"hf{g}", gathered=g) for g in (False, True)]
    found["old"] = old(root / "old", root / "disk")
    found["late"] = late()
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
