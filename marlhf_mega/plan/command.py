"""`marlhf plan`: its options and what it prints. Needs no torch and takes under a second."""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

from marlhf_mega.config.limits import GIB
from marlhf_mega.config.load import ConfigError, with_keys
from marlhf_mega.config.schema import Config
from marlhf_mega.plan.calibrate import activation_factor
from marlhf_mega.plan.changes import smallest_change
from marlhf_mega.plan.checkpoints import Reliability
from marlhf_mega.plan.gpus import GPUS, find_gpu
from marlhf_mega.plan.plan import Cluster, make_plan
from marlhf_mega.plan.report import as_json, as_text
from marlhf_mega.plan.search import search
from marlhf_mega.plan.timing import Efficiencies

SHOWN_LAYOUTS = 10


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `plan` besides the configuration."""
    rates, reliability = Efficiencies(), Reliability()
    known = ", ".join(gpu.name for gpu in GPUS.values())
    parser.add_argument(
        "--job", default="ppo", help="sft, reward, preference or ppo (default: ppo)"
    )
    parser.add_argument("--nodes", type=int, default=1, help="number of machines (default: 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of each (default: 8)")
    parser.add_argument("--gpu", default="H100", help=f"one of {known} (default: H100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plan as JSON")
    parser.add_argument(
        "--search", action="store_true", help="list the layouts that fit, the fastest first"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="RUN",
        help="scale activations to the peak memory that this GPU run measured",
    )
    parser.add_argument("--no-engine", action="store_true", help="plan without Transformer Engine")
    parser.add_argument(
        "--mfu",
        type=float,
        default=rates.training_flops,
        help=f"share of the peak that training reaches (default: {rates.training_flops})",
    )
    parser.add_argument(
        "--mtbf-hours",
        type=float,
        default=reliability.mtbf_hours,
        help=f"mean time between failures of one GPU (default: {reliability.mtbf_hours:.0f})",
    )
    parser.add_argument(
        "--write-gb-per-second",
        type=float,
        default=reliability.write_bytes / 1e9,
        help="rate at which one machine writes to the run directory "
        f"(default: {reliability.write_bytes / 1e9:.0f})",
    )


def run_plan(config: Config, options: argparse.Namespace) -> int:
    """Print the plan; returns 0 if the job fits and 1 if not.

    Args:
        config: as loaded; a missing vocabulary size is taken from the tokenizer.
        options: of `add_options`.

    Raises:
        ConfigError: the job cannot be planned.
    """
    if options.json is not None and not options.json.parent.is_dir():
        raise ConfigError(
            f"--json={options.json}: must be in an existing folder; there is none. Create the "
            "folder."
        )
    config, cluster = with_vocabulary(config), _cluster(options)
    if options.calibrate is not None:
        factor = activation_factor(options.calibrate, cluster)
        sys.stdout.write(f"{options.calibrate}: activations x {factor:.3f}\n")
        cluster = replace(cluster, activation_factor=factor)
    if options.search:
        return _search(config, options, cluster)
    plan = make_plan(config, options.job, cluster)
    change = None if plan.fits else smallest_change(plan)
    sys.stdout.write(as_text(plan, change))
    if options.json is not None:
        options.json.write_text(json.dumps(as_json(plan, change), indent=1) + "\n")
    return 0 if plan.fits else 1


def with_vocabulary(config: Config) -> Config:
    """Take a missing vocabulary size from the tokenizer."""
    path = config.tokenizer.path
    if config.model.vocab_size is not None or path is None:
        return config
    from marlhf_mega.data.tokenizer import Tokenizer  # which takes seconds to import

    return with_keys(config, {"model.vocab_size": Tokenizer.load(path).vocab_size})


def _cluster(options: argparse.Namespace) -> Cluster:
    for key in ("nodes", "gpus_per_node", "mfu", "mtbf_hours", "write_gb_per_second"):
        value = getattr(options, key)
        flag = f"--{key.replace('_', '-')}={value}"
        if not 0 < value < math.inf:
            raise ConfigError(f"{flag}: must be above 0 and finite. Give a number.")
        if key == "mfu" and value > 1:
            raise ConfigError(f"{flag}: must be a share of at most 1. Give for example 0.4.")
    return Cluster(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        gpu=find_gpu(options.gpu),
        has_engine=not options.no_engine,
        rates=Efficiencies(training_flops=options.mfu),
        reliability=Reliability(
            mtbf_hours=options.mtbf_hours, write_bytes=options.write_gb_per_second * 1e9
        ),
    )


def _search(config: Config, options: argparse.Namespace, cluster: Cluster) -> int:
    found = search(config, options.job, cluster)
    for keys, plan in found[:SHOWN_LAYOUTS]:
        shown = " ".join(f"{key}={value}" for key, value in keys.items() if value is not None)
        spare = plan.spare / GIB
        sys.stdout.write(f"{plan.step_seconds:8.1f} s  {spare:6.1f} GiB to spare  {shown}\n")
    if not found:
        sys.stdout.write("no layout fits these machines; use more of them\n")
    if options.json is not None:
        layouts = [{"keys": keys, **as_json(plan, None)} for keys, plan in found]
        options.json.write_text(json.dumps(layouts, indent=1) + "\n")
    return 0 if found else 1
