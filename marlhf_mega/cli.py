"""The command line: `marlhf COMMAND --config FILE [key=value ...]`, alone or under torchrun."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, get_args

from marlhf_mega.config.checks import TrainingJob
from marlhf_mega.config.exit_codes import EXIT_FAILED, EXIT_USAGE, code_for_launcher
from marlhf_mega.config.load import ConfigError, dump_config, load_config
from marlhf_mega.config.schema import Config
from marlhf_mega.config.secrets import RedactingFormatter
from marlhf_mega.garbage import pause_collections, resume_collections
from marlhf_mega.jobs import PreparedJob, prepare_job
from marlhf_mega.lifeline import die_with_launcher
from marlhf_mega.plan.command import add_plan_options, run_plan, with_vocabulary
from marlhf_mega.plan.workload import PlannedJob
from marlhf_mega.report.command import add_report_options, run_report
from marlhf_mega.train.complete import Complete, find_complete

logger = logging.getLogger(__name__)

COMMANDS = {
    "quickstart": "run SFT, reward model, macro PPO and evaluation on built-in data",
    "init": "write a first configuration for your model and data, of a size that fits here",
    "sft": "fine-tune a policy on demonstrations",
    "reward": "train a reward model on preference pairs",
    "preference": "train a policy on preference pairs by DPO and its relatives",
    "ppo": "train a policy against a reward by PPO over macro actions",
    "offline": "train a policy on scored responses by Advantage-Leftover Lunch RL (A-LoL)",
    "evaluate": "answer held-out prompts and judge the answers",
    "generate": "answer every prompt of a file, with scores",
    "report": "write a page about one run, or one that compares several",
    "plan": "estimate memory, time and checkpoints of a job on a cluster, without running it",
    "doctor": "check devices, versions, disk and sandbox here, network and clocks between ranks",
}

EXAMPLES = {
    "quickstart": "bash launch/quickstart.sh run.dir=runs/mine",
    "init": "marlhf init --hf-path HF_DIR --data demos.jsonl",
    "sft": "marlhf sft --config configs/e2e_nlg_sft.yaml --world-size 4 --check",
    "reward": "marlhf reward --config configs/e2e_nlg_reward.yaml data.train_path=pairs.jsonl.gz",
    "preference": "marlhf preference --config my.yaml data.train_path=pairs.jsonl",
    "ppo": "marlhf ppo --config configs/llama3_70b_ppo.yaml --dry-run --world-size 128",
    "offline": "marlhf offline --config my.yaml data.train_path=answers.jsonl run.dir=runs/offline",
    "evaluate": "marlhf evaluate --config my.yaml model.init=runs/ppo run.dir=runs/evaluation",
    "generate": "marlhf generate --config my.yaml model.init=runs/ppo run.dir=runs/answers",
    "report": "marlhf report runs/ppo-ngram runs/ppo-token --out comparison.html",
    "plan": "marlhf plan --config configs/llama3_70b_ppo.yaml --nodes 16 --gpu H100",
    "doctor": "bash launch/torchrun.sh --ranks-per-node 4 doctor run.dir=runs/mine",
}


def run() -> NoReturn:
    """Run `main` as the program `marlhf`."""
    pause_collections()
    _end_now(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code, see `marlhf --help`.

    When a job fails, this ends the process.
    """
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    _set_up_logging()
    die_with_launcher()
    try:
        job = _prepare(options)
    except ValueError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.filename is None:
            return _refuse(str(error))
        return _refuse(
            f"{error.filename}: cannot be used; {error.strerror}. Fix it or use another path."
        )
    if isinstance(job, int):
        return job
    from marlhf_mega.resilience.preemption import EarlyEndError, hear_signals

    if job.saves:
        hear_signals()
    try:
        job.run()
    except EarlyEndError as end:
        logger.info("%s", end)
        return code_for_launcher(end.code)
    except ConfigError as error:  # a checkpoint of other settings: all training ranks see it
        _refuse(str(error))
        if job.num_rollout_ranks:
            _end_now(EXIT_FAILED)  # the ranks that only generate still wait; the launcher ends them
        return code_for_launcher(EXIT_USAGE)
    except Exception as error:
        logger.exception("rank %d failed: %s", _rank(), error)
        _end_now(EXIT_FAILED)
    return code_for_launcher(0)


def _prepare(options: argparse.Namespace) -> PreparedJob | int:
    """Return the job to run, or the exit code if there is nothing left to run."""
    if options.command == "report":
        return run_report(options)
    if options.command == "init":
        return _init(options)
    _check_world_size(options)
    dry, planned = getattr(options, "dry_run", False), options.command == "plan"
    config = load_config(options.config, options.overrides, need_weights=not (dry or planned))
    check = getattr(options, "check", False)
    if options.print_config and not check:
        return _write(dump_config(config))
    if options.command == "doctor":
        return _doctor(config)
    if planned:
        return run_plan(config, options)
    if dry:
        return _dry_run(config, options)
    # Ranks that were started together decide together: under torchrun before they read anything,
    # elsewhere once they have met.
    is_alone = check or os.environ.get("WORLD_SIZE", "1") == "1"
    is_training = options.command in get_args(TrainingJob)
    if is_training and (done := _find_complete(config, is_alone=is_alone)):
        return _say_complete(done)
    world_size = getattr(options, "world_size", None)
    job = prepare_job(options.command, config, world_size=world_size)
    if is_alone and (done := job.finished()):
        return _say_complete(done)
    if not check:
        return job
    if job.warning is not None:
        logger.warning("%s", job.warning)
    shown = dump_config(config) if options.print_config else ""
    return _write(f"{shown}{job.summary()}\n")


def _find_complete(config: Config, *, is_alone: bool) -> Complete | None:
    found = find_complete(config)
    if is_alone or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return found if is_alone else None
    from marlhf_mega.parallel.launch import of_first_rank

    return of_first_rank(found)


def _say_complete(done: Complete) -> int:
    from marlhf_mega.metrics.progress import show_results

    _write(f"{done.describe()}\n")
    if done.held_out and _rank() == 0:
        show_results("held-out, at the end", done.held_out)
    return 0


def _write(text: str) -> int:
    if _rank() == 0:
        sys.stdout.write(text)
    return 0


def _refuse(message: str) -> int:
    if _rank() == 0:
        sys.stderr.write(f"{message}\n")
    return EXIT_USAGE


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line; overrides may stand before and after options."""
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if unknown := [word for word in more if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if more:
        options.overrides += more
    if other := getattr(options, "against", None):
        options.overrides.append(f"evaluate.against={other}")
    return options


def _check_world_size(options: argparse.Namespace) -> None:
    size = getattr(options, "world_size", None)
    if size is not None and not (options.dry_run or options.check):
        raise ConfigError(
            f"--world-size={size}: needs --dry-run or --check; a run takes its size from torchrun. "
            "Leave it out, or start the ranks with torchrun."
        )
    if size is not None and size <= 0:
        raise ConfigError(f"--world-size={size}: must be above 0. Give a positive number.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marlhf",
        description="Reinforcement learning from human feedback with macro actions on "
        "Megatron-Core. Every command runs on one rank, or on many ranks under torchrun "
        "(bash launch/torchrun.sh COMMAND ...).",
        epilog="Exit codes: 0 done; 1 failed; 2 wrong usage or configuration, nothing was started; "
        "70 a rank hung or was lost; 75 pre-empted, checkpoint saved, start it again; "
        "76 no progress over several restarts, do not start it again.",
    )
    parser.add_argument("--version", action="version", version=f"marlhf {version('marlhf-mega')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=f"Example: {EXAMPLES[name]}",
        )
        if name == "report":
            add_report_options(command)
            continue
        if name == "init":
            _add_init_options(command)
            continue
        command.add_argument(
            "--config",
            type=Path,
            help="YAML file with the keys that differ from their defaults (default: none)",
        )
        command.add_argument(
            "--print-config",
            action="store_true",
            help="print the resolved configuration and stop; with --check, after the checks",
        )
        if name == "plan":
            add_plan_options(command)
        elif name != "doctor":
            looks = command.add_mutually_exclusive_group()
            looks.add_argument(
                "--check",
                action="store_true",
                help="read and check everything that a run would read, of a checkpoint only its "
                "settings; print layout, rows, steps and tokens in one line and stop",
            )
            if name in get_args(PlannedJob):
                looks.add_argument(
                    "--dry-run",
                    action="store_true",
                    help="build every distinct rank on the meta device, print what it holds, stop",
                )
                command.add_argument(
                    "--world-size",
                    type=int,
                    help="number of ranks for --dry-run (default: 1) and --check (default: the "
                    "ranks that were started)",
                )
        if name == "evaluate":
            command.add_argument(
                "--against",
                metavar="OTHER",
                help="compare with another policy on the same prompts: a run directory or a "
                "Hugging Face folder (evaluate.against)",
            )
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="override a key, for example ppo.epochs=2; key=null unsets an optional key; "
            "configs/KEYS.md lists all keys",
        )
    return parser


def _add_init_options(command: argparse.ArgumentParser) -> None:
    jobs = get_args(TrainingJob)
    command.add_argument("--hf-path", type=Path, required=True, help="Hugging Face model folder")
    command.add_argument("--data", required=True, help="training data, as data.train_path")
    command.add_argument(
        "--job", choices=jobs, help="what the file is for (default: by the fields of the data)"
    )
    command.add_argument("--output", type=Path, help="the new file (default: JOB.yaml)")


def _init(options: argparse.Namespace) -> int:
    from marlhf_mega.commands.init import run_init

    return run_init(options.hf_path, options.data, job=options.job, output=options.output)


def _dry_run(config: Config, options: argparse.Namespace) -> int:
    from marlhf_mega.commands.dry_run import dry_run

    resume_collections()
    ranks = 1 if options.world_size is None else options.world_size
    lines, problems = dry_run(with_vocabulary(config), options.command, ranks)
    sys.stdout.write(
        "\n".join([*lines, *problems, "fails" if problems else "nothing fails"]) + "\n"
    )
    return EXIT_FAILED if problems else 0


def _doctor(config: Config) -> int:
    from marlhf_mega.commands.doctor import examine, table

    findings = examine(config)
    if _rank() == 0:
        sys.stdout.write(table(findings))
    return EXIT_FAILED if any(finding.status == "FAIL" for finding in findings) else 0


class _StandardError(logging.StreamHandler[Any]):
    """Writes to what stderr is at the moment: while a progress bar is shown, above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)


def _end_now(code: int) -> NoReturn:
    """End the process without shutting the interpreter down.

    The threads of process groups may free a tensor meanwhile, also of groups that are destroyed,
    and a thread that needs a Python that shuts down aborts the process.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _set_up_logging() -> None:
    """Log at INFO on rank 0 and only warnings on the other ranks."""
    handler = _StandardError()
    # The line may hold the first rank's progress bar.
    clear = "\r\033[K" if _rank() and sys.stderr.isatty() else ""
    line = f"{clear}%(asctime)s %(levelname).1s %(message)s"
    handler.setFormatter(RedactingFormatter(line, "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if _rank() == 0 else logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    for noisy in ("py.warnings", "megatron", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
