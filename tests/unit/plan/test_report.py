"""The text and the JSON of a plan."""

import json

import pytest

from marlhf_mega.cli import main
from marlhf_mega.plan.report import as_text
from tests.unit.plan.plans import WHOLE, planned_disaggregated


def test_the_report_shows_both_kinds_of_ranks(disaggregated_file, tmp_path, capsys):
    out = tmp_path / "plan.json"
    options = ["rollout.staleness=1", "--nodes", "16", "--json", str(out)]
    assert main(["plan", "--config", disaggregated_file, *options]) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    assert "16 x 8 H100: 96 ranks train at TP8 x PP4 x DP3 + SP, bfloat16\n" in text
    assert "\n32 ranks only generate, at TP8 x PP1 x DP4: 60 sequences at a time" in text
    assert "\nGiB on a rollout rank of stage 0\n" in text
    # Logits of 128256 / 8 tokens in float32, and their exponentials: 128256 bytes.
    assert "\nlog-probs: 0.12 MiB for the logits of a token on a rank\n" in text
    assert "\nrollout rank " in text
    generating, training = 24.576 + found["step_seconds"]["rollout prefill"], 0.0
    for part, seconds in found["step_seconds"].items():
        training += 0.0 if part.startswith("rollout") else seconds
    assert (
        f"\nresharding 0.4 s; 32 ranks generate for {generating:.1f} s, while 96 train for "
        f"{training:.1f} s\n"
    ) in text
    assert found["whole_step_seconds"] == pytest.approx(generating + 2 * WHOLE / 40e9)
    assert (found["rollout_ranks"], found["rollout_layout"]["data"]) == (32, 4)
    (stage,) = found["rollout_stages"]
    assert stage["roles"]["policy"]["weights"] == 2 * WHOLE
    assert ", then 96 train for " in as_text(planned_disaggregated(), None)


def test_everything_is_written_as_json(file, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["plan", "--config", file, "--nodes", "16", "--json", str(out)]) == 1
    found = json.loads(out.read_text())
    assert found["change"] == {"ppo.microbatch_size": 4}
    assert found["verdict"] == capsys.readouterr().out.splitlines()[-1]
    assert found["verdict"].startswith("does not fit: ")
    assert len(found["stages"]) == 4
    worst = max(s["phase_bytes"]["update"] for s in found["stages"])
    assert found["peak_bytes"] == worst == found["usable_bytes"] - found["spare_bytes"]
    assert found["roles"]["policy"] == {"parameters": 70_553_706_496, "assumed_shape": False}
    assert found["roles"]["reward"]["assumed_shape"] is True


def test_tensor_parallelism_across_machines_is_pointed_out(file, capsys):
    arguments = ["plan", "--config", file, "--nodes", "32", "--gpus-per-node", "4"]
    main(arguments)
    assert "tensor parallelism spans several machines" in capsys.readouterr().out
