"""Save and restore on four ranks, at one layout after another."""

import json
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from marlhf_mega.checkpoint import manifest, saver, sharded, store
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.sections.hardware import ParallelConfig
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from tests.distributed import checkpoint_model as tiny

BASE = {"tensor_size": 2, "pipeline_size": 2}
STATE = {"stream": {"num_consumed": 16}, "kl_coef": 0.1, "moments": [3, 0.1 + 0.2, 1e-300]}


def save(run_dir, step, role, mesh, name="policy"):
    return saver.save(run_dir, step, {name: role}, STATE, mesh, keep=3)


def content_of(folder):
    """Sizes and checksums but of the tables of contents, in which torch notes the path."""
    files = manifest.read(folder)["files"]
    return {name: facts for name, facts in files.items() if not name.endswith(".metadata")}


def resume_exactly(run_dir, layout, options):
    """Two steps, a save, two steps; then a fresh model, the load, the same two steps."""
    mesh = create_mesh(ParallelConfig(**layout))
    role = tiny.make_role(mesh, **options)
    tiny.train(role, mesh, [0, 1])
    at_save = tiny.digests(role)
    twin = save(run_dir.with_name(f"{run_dir.name}_twin"), 2, role, mesh)
    untouched = tiny.digests(role)
    # The checkpoint that is resumed is written after the next steps were taken.
    gate, write = threading.Event(), sharded.Staged.write
    sharded.Staged.write = lambda staged: gate.wait(60) and write(staged)
    writer = saver.Saver(run_dir, mesh, keep=3, background=True)
    folder = writer.save(2, {"policy": role}, STATE)
    expected = tiny.train(role, mesh, [2])
    writer.poll()
    expected += tiny.train(role, mesh, [3])
    early = folder.exists()
    gate.set()
    writer.finish()
    sharded.Staged.write = write
    at_end = tiny.digests(role)
    other = tiny.make_role(mesh, **options | {"seed": 99})
    fresh = tiny.digests(other)
    state = store.load(store.find(run_dir, mesh), {"policy": other}, mesh)
    at_load = tiny.digests(other)
    found = tiny.train(other, mesh, [2, 3])
    resumed = tiny.digests(other)
    dtypes = sorted(
        {str(p.dtype) for chunk in other.chunks for p in chunk.parameters()}
        | {str(p.dtype) for part in tiny.parts(other) for p in part.get_parameters()}
    )
    destroy_mesh(leave_world=False)
    return {
        "state": state,
        "early": early,
        "files": [content_of(twin), content_of(folder)],
        "dtypes": dtypes,
        "digests": [fresh, at_save, untouched, at_load, at_end, resumed],
        "expected": expected,
        "found": found,
    }


def reshard(first, second, layout, options):
    """Continue the run in `first` at a layout, and save what was loaded in `second`."""
    mesh = create_mesh(ParallelConfig(**layout))
    role = tiny.make_role(mesh, **options | {"seed": 99})
    store.load(store.find(first, mesh), {"policy": role}, mesh)
    save(second, 2, role, mesh)
    steps = tiny.train(role, mesh, [2, 3])
    destroy_mesh(leave_world=False)
    mesh = create_mesh(ParallelConfig(**BASE))
    role = tiny.make_role(mesh, **options | {"seed": 98})
    store.load(store.find(second, mesh), {"policy": role}, mesh)
    back = tiny.digests(role)
    destroy_mesh(leave_world=False)
    return {"steps": steps, "back": back}


def refused(action):
    try:
        action()
    except (RuntimeError, ConfigError) as error:
        return str(error)
    return "not refused"


def base_refused(run, options):
    """Load adapters for other weights than theirs, and for a model without adapters."""
    mesh = create_mesh(ParallelConfig(**BASE))
    other = tiny.make_role(mesh, **options | {"base_seed": 2})
    plain = tiny.make_role(mesh, **options | {"lora": {}})
    newest = store.find(run, mesh)
    found = [
        refused(lambda: store.load(newest, {"policy": other}, mesh)),
        refused(lambda: store.load(newest, {"policy": plain}, mesh)),
    ]
    destroy_mesh(leave_world=False)
    return found


def weights(root, policy_run):
    """Weights without optimizer into models of either head, at other layouts."""
    mesh = create_mesh(ParallelConfig(**BASE))
    policy = tiny.make_role(mesh, seed=99)
    store.load(store.find(policy_run, mesh), {"policy": policy}, mesh)
    reward = tiny.make_role(mesh, head="scalar", seed=5)
    tiny.train(reward, mesh, [0])
    found = {
        "policy": tiny.outputs(policy.chunks, mesh),
        "reward": tiny.outputs(reward.chunks, mesh),
    }
    folder = save(root / "reward", 1, reward, mesh, name="reward")
    found["stepped"] = store.load(folder, {"reward": reward}, mesh)
    never = tiny.make_role(mesh, seed=8)
    save(root / "never", 0, never, mesh)
    before = tiny.digests(never)
    again = tiny.make_role(mesh, seed=9)
    store.load(store.find(root / "never", mesh), {"policy": again}, mesh)
    found["never_stepped"] = [before, tiny.digests(again)]
    found["never_stepped_steps"] = [tiny.train(r, mesh, [0, 1]) for r in (never, again)]
    destroy_mesh(leave_world=False)

    mesh = create_mesh(ParallelConfig(pipeline_size=2, virtual_pipeline_size=2))
    reference = tiny.make_chunks(mesh, seed=99)
    found["reference_fresh"] = store.load_weights(policy_run, reference, mesh)
    found["reference"] = tiny.outputs(reference, mesh)
    critic = tiny.make_chunks(mesh, head="scalar", seed=99)
    found["critic_fresh"] = store.load_weights(folder, critic, mesh)
    found["critic"] = tiny.outputs(critic, mesh)
    half = tiny.make_chunks(mesh, dtype="bfloat16", seed=99)
    store.load_weights(policy_run, half, mesh, role="policy")
    found["bfloat16"] = tiny.outputs(half, mesh)

    body = tiny.make_chunks(mesh, head="scalar", seed=7)
    heads = [c.output_layer.weight for c in body if c.post_process]
    drawn = [head.detach().clone() for head in heads]
    found["body_fresh"] = store.load_weights(policy_run, body, mesh)
    kept = all(torch.equal(a, b) for a, b in zip(heads, drawn, strict=True))
    same = all(
        torch.equal(tensor, reference[i].state_dict()[name])
        for i, chunk in enumerate(body)
        for name, tensor in chunk.state_dict().items()
        if isinstance(tensor, torch.Tensor) and not name.startswith("output_layer")
    )
    flags = [None] * mesh.world_size
    dist.all_gather_object(flags, [kept, same])
    found["body_flags"] = flags

    language = tiny.make_chunks(mesh, seed=99)
    small = tiny.make_role(mesh, hidden_size=16)
    deep = tiny.make_role(mesh, num_layers=8)
    tied = tiny.make_role(mesh, tied=True)
    good = tiny.make_role(mesh)
    newest = store.find(policy_run, mesh)
    found["refused"] = {
        "head": refused(lambda: store.load_weights(root / "reward", language, mesh, role="reward")),
        "role": refused(lambda: store.load_weights(root / "reward", language, mesh)),
        "run": refused(lambda: store.load_weights(root / "nothing", language, mesh)),
        "width": refused(lambda: store.load(newest, {"policy": small}, mesh)),
        "depth": refused(lambda: store.load(newest, {"policy": deep}, mesh)),
        "unused": refused(lambda: store.load(newest, {"policy": tied}, mesh)),
        "model": refused(lambda: store.load(newest, {"policy": good, "critic": good}, mesh)),
        "state": refused(lambda: store.load(newest, {"policy": good}, mesh, required=["rng"])),
    }
    destroy_mesh(leave_world=False)
    return found


def main():
    out, root, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    found = {"exact": {}, "reshard": {}}
    for index, (name, (layout, options)) in enumerate(cases["exact"].items()):
        found["exact"][name] = resume_exactly(root / f"exact{index}", layout, options)
    for index, (name, layout) in enumerate(cases["reshard"].items()):
        found["reshard"][name] = reshard(root / "exact0", root / f"reshard{index}", layout, {})
    first = list(cases["exact"]).index(cases["adapters"])
    options = cases["exact"][cases["adapters"]][1]
    adapters = root / f"exact{first}"
    found["adapters"] = {
        "reshard": reshard(adapters, root / "adapters", {"tensor_size": 4}, options),
        "refused": base_refused(adapters, options),
    }
    found["weights"] = weights(root, root / "exact0")
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
