"""Start a rank script under torchrun and read what its rank 0 wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run_ranks(script: str, num_ranks: int, out: Path, *arguments: str, timeout: float = 300) -> Any:
    """Run `tests/distributed/SCRIPT OUT ARGUMENTS...` on `num_ranks` gloo ranks; return its JSON."""
    command = [sys.executable]
    if num_ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(num_ranks)]
    done = subprocess.run(
        [*command, str(HERE / script), str(out), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(out.read_text())
