"""A job, one of whose ranks is killed in a decode step of its engine: FOLDER, the job's arguments.

Every rank writes its process and those that it has started to FOLDER before.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from marlhf_mega.rollout.vllm_engine import VllmEngine
from marlhf_mega.rollout.vllm_process import import_vllm

VICTIM, STEP = 1, 5
"""Rank, and the decode step of its second call: the rollout that follows the first evaluation."""


def descendants(process):
    found = [process]
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        for child in path.read_text().split():
            found += descendants(int(child))
    return found


def main():
    folder, rank = Path(sys.argv.pop(1)), int(os.environ["RANK"])
    import_vllm()
    from vllm.v1.engine.llm_engine import LLMEngine

    complete, step = VllmEngine.complete, LLMEngine.step
    counts = {"calls": 0, "steps": 0}

    def counted(*args, **kwargs):
        counts["calls"] += 1
        counts["steps"] = 0
        return complete(*args, **kwargs)

    def one_step(engine):
        counts["steps"] += 1
        if counts["calls"] == 2:
            if counts["steps"] == STEP - 1:  # its peer is here too, or has been
                text = " ".join(map(str, descendants(os.getpid())))
                (folder / str(rank)).write_text(text)
            if counts["steps"] == STEP and rank == VICTIM:
                os.kill(os.getpid(), signal.SIGKILL)
        return step(engine)

    VllmEngine.complete, LLMEngine.step = counted, one_step
    runpy.run_module("marlhf_mega", run_name="__main__")


if __name__ == "__main__":
    main()
