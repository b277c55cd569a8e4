"""The command line: `marlhf COMMAND --config FILE [key=value ...]`, alone or under torchrun."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from marlhf_mega.config.checks import rollout_ranks
from marlhf_mega.config.exit_codes import (
    EXIT_CODE_FILE,
    EXIT_FAILED,
    EXIT_USAGE,
)
from marlhf_mega.config.load import ConfigError, dump_config, load_config
from marlhf_mega.config.schema import Config
from marlhf_mega.config.secrets import RedactingFormatter
from marlhf_mega.plan.command import add_options, run_plan, with_vocabulary

COMMANDS = {
    "quickstart": "the whole story on built-in data: sft, reward model, macro ppo, a report",
    "sft": "fine-tune a policy on demonstrations",
    "reward": "train a reward model on preference pairs",
    "ppo": "train the policy against the reward with macro-action PPO",
    "offline": "train the policy on given responses by their advantage (A-LoL)",
    "evaluate": "generate on held-out prompts and judge",
    "generate": "answer every prompt of a file, with scores",
    "plan": "memory, time and checkpoints of a job on a cluster, without running it",
    "doctor": "what this machine has, and whether its ranks, network and disk work together",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and end the process with its exit code."""
    code = run(sys.argv[1:] if arguments is None else arguments)
    if code == EXIT_FAILED:
        _end_now(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code, see `marlhf --help`."""
    options = _parse(arguments)
    _set_up_logging()
    try:
        _check_world_size(options)
        dry, planned = getattr(options, "dry_run", False), options.command == "plan"
        config = load_config(options.config, options.overrides, need_weights=not (dry or planned))
        if options.print_config:
            return _show(config)
        if options.command == "doctor":
            return _doctor(config)
        if planned:
            return run_plan(config, options)
        if dry:
            return _dry_run(config, options)
        job = _prepare(options.command, config, getattr(options, "world_size", None))
        if options.check:
            return _show(config)
    except ValueError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.filename is None:
            return _refuse(str(error))
        return _refuse(
            f"{error.filename}: cannot be used; {error.strerror}. Mend it or use another path."
        )
    return job()


def _show(config: Config) -> int:
    if _rank() == 0:
        sys.stdout.write(dump_config(config))
    return 0


def _refuse(message: str) -> int:
    if _rank() == 0:
        sys.stderr.write(f"{message}\n")
    return EXIT_USAGE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; settings may stand before and after options."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if unknown := [word for word in more if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += more
    return options


def _check_world_size(options: argparse.Namespace) -> None:
    size = getattr(options, "world_size", None)
    if size is not None and not (options.dry_run or options.check):
        raise ConfigError(
            f"--world-size={size}: is for --dry-run and --check; a run has as many ranks as were "
            "started. Leave it out, or start them with torchrun."
        )
    if size is not None and size <= 0:
        raise ConfigError(f"--world-size={size}: must be above 0. Give a positive number.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marlhf",
        description="Reinforcement learning from human feedback with macro actions on "
        "Megatron-Core. Every command runs on one rank, or on many under torchrun.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong usage or configuration (nothing started), "
        "70 a rank hung or was lost, 75 pre-empted with a checkpoint (start it again), "
        "76 no progress (do not).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        command = commands.add_parser(
            name, help=about, description=about[0].upper() + about[1:] + "."
        )
        command.add_argument(
            "--config", type=Path, help="YAML file with what differs from defaults"
        )
        command.add_argument(
            "--print-config", action="store_true", help="show the resolved configuration and stop"
        )
        looks = command.add_mutually_exclusive_group()
        if name == "plan":
            add_options(command)
        elif name != "doctor":
            looks.add_argument(
                "--check",
                action="store_true",
                help="read and check all that a run would, a checkpoint's settings included, "
                "show it, stop",
            )
        if name in ("sft", "reward", "ppo"):
            looks.add_argument(
                "--dry-run", action="store_true", help="build every rank without memory and report"
            )
            command.add_argument("--world-size", type=int, help="ranks of a dry run or a check")
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="dotted keys, such as ppo.epochs=2; key=null unsets what may be unset",
        )
    return parser


def _prepare(command: str, config: Config, world_size: int | None) -> Callable[[], int]:
    """Read everything the command needs; what remains to be done needs the other ranks.

    train/COMMAND.py holds both: `COMMAND_inputs(config, world_size)` reads and checks without
    communication, `run_COMMAND(inputs, mesh)` does the work. The import is here so that wrong
    usage is reported at once, before torch and Megatron load.

    Raises:
        ValueError: anything that the user has to mend.
    """
    job = importlib.import_module(f"marlhf_mega.train.{command}")
    from marlhf_mega.parallel.mesh import world_size_from_environment

    ranks = world_size_from_environment() if world_size is None else world_size
    inputs = getattr(job, f"{command}_inputs")(config, ranks)
    run_job = getattr(job, f"run_{command}")
    apart = rollout_ranks(inputs.config, command)
    return lambda: _on_mesh(inputs.config, lambda mesh: run_job(inputs, mesh), apart)


def _dry_run(config: Config, options: argparse.Namespace) -> int:
    from marlhf_mega.train.dry_run import dry_run

    ranks = 1 if options.world_size is None else options.world_size
    lines, problems = dry_run(with_vocabulary(config), options.command, ranks)
    sys.stdout.write(
        "\n".join([*lines, *problems, "fails" if problems else "nothing fails"]) + "\n"
    )
    return EXIT_FAILED if problems else 0


def _doctor(config: Config) -> int:
    from marlhf_mega.train.doctor import examine, table

    findings = examine(config)
    if _rank() == 0:
        sys.stdout.write(table(findings))
    return EXIT_FAILED if any(finding.status == "FAIL" for finding in findings) else 0


def _on_mesh(config: Config, work: Callable[[Any], Any], num_rollout_ranks: int) -> int:
    from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
    from marlhf_mega.train.stop import EarlyEndError

    mesh = create_mesh(
        config.parallel,
        num_rollout_ranks=num_rollout_ranks,
        rollout_parallel=config.rollout_parallel,
        timeout_seconds=config.watchdog.collective_seconds,
    )
    code = 0
    try:
        work(mesh)
    except EarlyEndError as end:
        logging.getLogger(__name__).info("%s", end)
        code = end.code
    except ConfigError as error:  # such as a checkpoint of other settings: seen by all that train
        if mesh.launch.rank == 0:
            sys.stderr.write(f"{error}\n")
        if num_rollout_ranks:
            return EXIT_FAILED  # those that only generate wait: the launcher ends them
        code = EXIT_USAGE
    except Exception as error:
        logging.getLogger(__name__).exception("rank %d failed: %s", mesh.launch.rank, error)
        return EXIT_FAILED
    destroy_mesh()
    return _for_launcher(code)


def _end_now(code: int) -> None:
    """End the process without taking the interpreter down.

    Groups of a failed run are not destroyed, since that waits for peers that may be gone. A thread
    of theirs that gives up a tensor while the interpreter ends would abort the process.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _for_launcher(code: int) -> int:
    """Leave a code that all ranks end with where the launcher finds it, and return 0 instead.

    The launcher would start ranks that end with another code again.
    """
    file = os.environ.get(EXIT_CODE_FILE)
    if file is None or not code:
        return code
    Path(file).write_text(f"{code}\n")  # the same on every rank of this machine
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _set_up_logging() -> None:
    """Say what happens on rank 0, only warnings elsewhere."""
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if _rank() == 0 else logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    for noisy in ("py.warnings", "megatron", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
