import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_benchmark_measures_every_shape_and_writes_what_it_prints(tmp_path):
    out = tmp_path / "macro_ops.json"
    command = [sys.executable, ROOT / "tools" / "benchmark" / "macro_ops.py"]
    command += ["--rule", "random_ngram", "--seconds", "0", "--out", out]
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)}
    )
    *lines, summary = run.stdout.splitlines()
    found = json.loads(out.read_text())
    assert json.loads(summary) == found
    assert len(lines) == len(found["results"]) == 12
    shapes = {(row["batch"], row["response_tokens"]) for row in found["results"]}
    assert shapes == {(b, r) for b in (1, 8, 32, 256) for r in (128, 512, 1024)}
    assert all(row["least_ms_per_batch"] <= row["ms_per_batch"] for row in found["results"])
