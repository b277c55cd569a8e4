"""Host memory of a machine, by hand."""

import json
import re

import pytest

from marlhf_mega.cli import main
from tests.unit.plan.plans import planned

MIB = 1 << 20


def test_a_background_save_copies_a_machines_share_of_the_checkpoint():
    plan = planned({"checkpoint.async_save": True})
    share = -(-plan.checkpoints.num_bytes // 128)
    assert plan.host.save == 8 * share
    assert planned().host.save == 8 * 10_000_000
    assert plan.host.load == 8 * 8 * MIB


def test_what_is_offloaded_is_on_the_host_of_every_rank():
    def held(part):
        return max(
            sum(getattr(role, part) for name, role in stage.roles.items() if name != skipped)
            for stage in planned().stages
        )

    assert planned().host.offload == 0
    skipped = "policy"
    assert planned({"memory.offload_idle": True}).host.offload == 8 * held("weights")
    skipped = None
    assert planned({"memory.offload_optimizer": True}).host.offload == 8 * held("optimizer")


def test_an_export_keeps_the_weights_that_adapters_are_merged_into():
    assert planned().host.export == 0
    lora = {"model.lora": {"rank": 16}}
    # Queries, keys and values, the output, gates and up, down: of 20 layers, an eighth of each.
    layer = 8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672
    host = planned(lora).host
    assert host.export == 8 * 20 * layer // 8 * 2
    assert host.total == host.export
    assert (
        planned({"model.lora": {"rank": 16, "targets": ["o_proj"]}}).host.export
        == 20 * 8192 * 8192 * 2
    )
    assert planned(lora | {"checkpoint.export_hf": False}).host.export == 0


def test_small_data_is_held_by_every_rank_and_other_data_once(tmp_path):
    assert planned().host.data is None
    path = tmp_path / "prompts.jsonl"
    path.write_text("x" * 4000)
    host = planned({"data.train_path": path, "checkpoint.async_save": True}).host
    assert host.data == 1000 * 118 * 8
    assert host.total == host.save + host.data
    path.write_text("x" * 4_000_000)
    assert planned({"data.train_path": path}).host.data == 1_000_000 * 4 + 8_000_000


def test_the_report_shows_it(file, tmp_path, capsys):
    out = tmp_path / "plan.json"
    main(["plan", "--config", file, "--nodes", "16", "--json", str(out)])
    line = (
        "\nhost memory of a machine, GiB: save 0.1, load 0.1, export 0.0, offload 0.0, data unknown"
    )
    assert line in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["host_memory"]["data"] is None


def test_the_report_says_how_long_a_stop_takes(file, capsys):
    main(["plan", "--config", file, "--nodes", "16"])
    text = capsys.readouterr().out
    step = float(re.search(r"\nstep ([\d.]+) s", text)[1])
    write = float(re.search(r"written in (\d+) s", text)[1])
    grace = int(re.search(r"a run that is asked to stop needs (\d+) s: a step and a save", text)[1])
    assert grace == pytest.approx(step + write, abs=1.6)  # rounded up; they to the nearest
    assert f"--signal=B:USR1@{grace}, " in text
