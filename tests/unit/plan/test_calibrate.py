"""A run's measured peak corrects the estimated memory of passes."""

import json

import pytest

from marlhf_mega.cli import main
from marlhf_mega.config.limits import GIB
from marlhf_mega.config.schema import Config
from tests.unit.plan.plans import DISAGGREGATED, PPO, planned, planned_disaggregated


def write_run(folder, layout, lines):
    folder.mkdir()
    values = Config.model_validate(PPO).model_dump(mode="json") | {"layout": layout}
    (folder / "config.yaml").write_text(json.dumps(values))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


GPU_RUN = "128 ranks: TP8 x PP4 x DP4 + SP (nccl, cuda)"


@pytest.mark.parametrize("metric", ["perf/peak_memory_gib", "perf/update_peak_memory_gib"])
def test_a_runs_peak_corrects_the_activations(file, tmp_path, capsys, metric):
    held = planned().stages[0].phases["update"]
    working = held["activations"] + held["backward"]
    measured = sum(held.values()) - working + 0.5 * working
    line = {
        "step": 1,
        "policy/loss": 0.0,
        metric: measured / GIB,
        "perf/peak_memory_gib": measured / GIB,
    }
    folder = write_run(tmp_path / "run", GPU_RUN, [line])
    assert main(["plan", "--config", file, "--nodes", "16", "--calibrate", folder]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{folder}: activations x 0.500\n")
    assert "\nfits: " in out


@pytest.mark.parametrize(
    ("layout", "lines", "reason"),
    [
        (
            "4 ranks: TP2 x PP2 x DP1 (gloo, cpu)",
            [{"step": 1, "perf/peak_memory_gib": 1}],
            "a run on GPUs",
        ),
        (GPU_RUN, [], "must have recorded its memory; no line of metrics.jsonl has"),
    ],
)
def test_a_run_that_tells_nothing_about_a_gpu(file, tmp_path, capsys, layout, lines, reason):
    folder = write_run(tmp_path / "run", layout, lines)
    assert main(["plan", "--config", file, "--calibrate", folder]) == 2
    assert reason in capsys.readouterr().err


def test_a_runs_peak_corrects_activations_of_its_own_number_of_ranks(
    disaggregated_file, tmp_path, capsys
):
    folder = tmp_path / "run"
    folder.mkdir()
    held = planned_disaggregated().stages[0].phases["update"]
    measured = sum(held.values()) - 0.5 * (held["activations"] + held["backward"])
    layout = "96 ranks: TP8 x PP4 x DP3 + SP (nccl, cuda), 32 more that only generate"
    values = Config.model_validate(DISAGGREGATED).model_dump(mode="json") | {"layout": layout}
    (folder / "config.yaml").write_text(json.dumps(values))
    peaks = dict.fromkeys(("perf/update_peak_memory_gib", "perf/peak_memory_gib"), measured / GIB)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, **peaks}) + "\n")
    assert (
        main(["plan", "--config", disaggregated_file, "--nodes", "16", "--calibrate", str(folder)])
        == 0
    )
    assert capsys.readouterr().out.startswith(f"{folder}: activations x 0.500\n")
