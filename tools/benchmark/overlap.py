"""Time PPO steps with and without ranks that only generate, at staleness 0 and 1.

    python tools/benchmark/overlap.py --ranks 4 --rollout-ranks 2 --rounds 3 model.num_layers=4

Runs the ppo job on built-in prompts with a rule as reward, in three ways that alternate: all ranks
do everything; some ranks only generate while the others wait (staleness 0); they generate one step
ahead (staleness 1). The first step of a run does not count. Prints readable lines and one JSON
object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common

from marlhf_mega.data import toy
from marlhf_mega.data.files import write_jsonl
from marlhf_mega.data.train_tokenizer import train_tokenizer

SETTINGS = [
    *("model.hidden_size=512", "model.num_layers=8", "model.num_attention_heads=8"),
    *("model.num_query_groups=4", "model.ffn_hidden_size=1408", "data.max_prompt_tokens=64"),
    *("rollout.batch_size=32", "rollout.max_response_tokens=64", "ppo.minibatch_size=8"),
    *("ppo.microbatch_size=8", "reward.source=marlhf_mega.data.toy:gold_reward"),
    *("checkpoint.export_hf=false", "logging.tensorboard=false", "checkpoint.resume=never"),
]
"""27 million parameters; overrides on the command line win."""
PHASES = ("step", "rollout", "generation", "reshard", "experience", "update")


def step_seconds(folder: Path, options: list[str], *, ranks: int) -> dict[str, float]:
    """Run the job; return the median seconds of a step and of its phases.

    Raises:
        CalledProcessError: it failed and has printed why.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "marlhf_mega", "ppo"]
    files = [f"data.train_path={folder / 'prompts.jsonl'}", f"tokenizer.path={folder / 'tok'}"]
    run_dir = folder / "run"
    subprocess.run(
        [*command, *SETTINGS, *files, f"run.dir={run_dir}", *options],
        check=True,
        env={"OMP_NUM_THREADS": "1"} | os.environ,
        stdout=subprocess.DEVNULL,
    )
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    counted = [line for line in lines if line["step"] > 1]
    # The last step generates nothing ahead.
    counted = counted[:-1] or counted
    return {
        phase: statistics.median(line.get(f"time/{phase}_seconds", 0.0) for line in counted)
        for phase in PHASES
    }


def main() -> int:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    options.add_argument("--ranks", type=int, default=4, help="processes to start")
    options.add_argument("--rollout-ranks", type=int, default=2, help="of them only generate")
    options.add_argument("--steps", type=int, default=8, help="PPO steps per run")
    options.add_argument("--rounds", type=int, default=3, help="runs of each way")
    options.add_argument("--out", type=Path, help=common.OUT_HELP)
    options.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the ppo job")
    args = options.parse_args()
    separate = f"rollout.ranks={args.rollout_ranks}"
    ways = {
        "together": [],
        "in turn": [separate],
        "one step ahead": [separate, "rollout.staleness=1", "ppo.tis_cap=2"],
    }
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_tokenizer(toy.tokenizer_text(0), folder / "tok", vocab_size=512)
        write_jsonl(folder / "prompts.jsonl", toy.generate_prompts(0, 1024))
        for _ in range(args.rounds):
            for way, own in ways.items():
                more = [f"run.steps={args.steps}", *args.overrides, *own]
                found[way].append(step_seconds(folder, more, ranks=args.ranks))
    spreads = {
        way: {phase: common.spread([r[phase] for r in rounds]) for phase in PHASES}
        for way, rounds in found.items()
    }
    for way, seconds in spreads.items():
        parts = ", ".join(f"{p} {seconds[p]['median']:.2f}" for p in PHASES[1:])
        step = seconds["step"]
        print(f"{way:15}{step['median']:7.3f} s ({step['min']:.3f} .. {step['max']:.3f}): {parts}")
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    common.write_json({"benchmark": "overlap", "settings": settings, **spreads}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
