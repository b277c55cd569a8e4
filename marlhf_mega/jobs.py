"""One job from its configuration to its results: `marlhf COMMAND` for scripts.

config = load_config(Path("configs/my.yaml"), ["run.steps=10"])
results = run_job("ppo", config)
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from marlhf_mega.config.checks import WITHOUT_TRAINING, Job, rollout_ranks
from marlhf_mega.config.load import ConfigError
from marlhf_mega.config.schema import Config
from marlhf_mega.garbage import resume_collections

if TYPE_CHECKING:
    from marlhf_mega.parallel.mesh import Mesh
    from marlhf_mega.resilience.watchdog import Watchdog
    from marlhf_mega.train.complete import Complete

logger = logging.getLogger(__name__)

Command = Job | Literal["quickstart"]


@dataclass(frozen=True, kw_only=True)
class PreparedJob:
    """A job whose files are read and whose settings are checked; nothing has been started."""

    config: Config
    """With what the inputs have filled in, such as the vocabulary size."""
    work: Callable[["Mesh", "Watchdog"], Any]
    """Does the job; all ranks call it."""
    num_rollout_ranks: int
    saves: bool
    """Whether it can be resumed: a signal then lets it save and end."""
    loaded: Config | None = None
    """The configuration as it was loaded, of a job that is not run again once it is finished."""
    run_dirs: tuple[Path, ...] = ()
    """Where such a job leaves its results."""
    summary: Callable[[], str] = lambda: ""
    """Says in one line what the job is going to do."""
    warning: str | None = None
    """Names the keys that have no effect."""

    def run(self) -> Any:
        """Join the other ranks, do the job, leave them. All ranks of the launch call it.

        A job that is finished is not done again: its results are those that it has left. After a
        failure process groups stay, since leaving them waits for peers that may be gone.

        Returns:
            What the job returns: for training jobs its last held-out results.

        Raises:
            EarlyEndError: the run ends before its last step, saved.
            ConfigError: the checkpoint is of other settings, or the run directory is in use.
        """
        from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
        from marlhf_mega.resilience.preemption import EarlyEndError
        from marlhf_mega.resilience.watchdog import Watchdog
        from marlhf_mega.train.products import choose_products

        mesh = create_mesh(
            self.config.parallel,
            num_rollout_ranks=self.num_rollout_ranks,
            rollout_parallel=self.config.rollout_parallel,
            timeout_seconds=self.config.watchdog.collective_seconds,
        )
        try:
            # The first rank decides: others may see an older state of a network file system.
            finished = mesh.launch.broadcast((self.finished(),), source=0)[0]
            if finished is not None:
                logger.info("%s", finished.describe())
                results = finished.results
            else:
                with Watchdog(self.config, mesh) as watchdog:
                    self._begin(mesh)
                    choose_products(self.config, mesh)
                    results = self.work(mesh, watchdog)
                    self._end(mesh, results)
        except EarlyEndError:
            destroy_mesh()
            raise
        except ConfigError:
            if not self.num_rollout_ranks:  # ranks that only generate have seen nothing and wait
                destroy_mesh()
            raise
        destroy_mesh()
        return results

    def finished(self) -> "Complete | None":
        """Return what a finished run of this job has left; none if there is work to do."""
        from marlhf_mega.train.complete import find_complete

        return None if self.loaded is None else find_complete(self.loaded)

    def _begin(self, mesh: "Mesh") -> None:
        from marlhf_mega.train.complete import forget_complete

        if mesh.launch.rank == 0 and self.loaded is not None:
            if self.warning is not None:
                logger.warning("%s", self.warning)
            forget_complete(self.loaded)

    def _end(self, mesh: "Mesh", results: Any) -> None:
        from marlhf_mega.train.complete import record_complete

        if mesh.launch.rank == 0 and self.loaded is not None:
            record_complete(self.loaded, results, self.run_dirs)


def run_job(command: Command, config: Config) -> Any:
    """Run one job as `marlhf COMMAND` does, alone or on every rank under torchrun.

    Raises:
        ValueError: anything that the user has to fix; nothing was started.
        EarlyEndError: the run ends before its last step, saved.
    """
    from marlhf_mega.resilience.preemption import hearing_signals

    job = prepare_job(command, config)
    with hearing_signals() if job.saves else nullcontext():
        return job.run()


def prepare_job(command: Command, config: Config, *, world_size: int | None = None) -> PreparedJob:
    """Read and check everything that a job needs, without communication.

    Imports are here so that wrong usage is reported before torch loads, and Megatron only for what
    passes the checks.

    Args:
        command: which job.
        config: as loaded.
        world_size: ranks of the launch; None means those that torchrun has started.

    Raises:
        ValueError: anything that the user has to fix.
    """
    from marlhf_mega import platform
    from marlhf_mega.train.inputs import read_inputs

    config = config.with_packing(on_gpu=platform.current().name == "cuda")
    ranks = platform.world_size() if world_size is None else world_size
    inputs: Any
    match command:
        case "sft" | "reward" | "ppo" | "offline" | "evaluate":
            inputs = read_inputs(config, command, ranks)
        case "preference":
            from marlhf_mega.train.preference_inputs import preference_inputs

            inputs = preference_inputs(config, ranks)
        case "generate":
            from marlhf_mega.commands.generate_inputs import generate_inputs

            inputs = generate_inputs(config, ranks)
        case "quickstart":
            from marlhf_mega.commands.quickstart import (
                JOBS,
                quickstart_inputs,
                quickstart_summary,
            )

            inputs = quickstart_inputs(config, ranks)
            folder = inputs.config.run.dir
            return PreparedJob(
                config=inputs.config,
                work=partial(_run, command, inputs),
                num_rollout_ranks=0,
                saves=True,
                loaded=inputs.config,
                run_dirs=(folder, *(folder / job for job in JOBS)),
                summary=partial(quickstart_summary, inputs, ranks),
            )
    from marlhf_mega.train.summary import summary, without_effect

    return PreparedJob(
        config=inputs.config,
        work=partial(_run, command, inputs),
        num_rollout_ranks=rollout_ranks(inputs.config, command),
        saves=command != "evaluate",
        loaded=None if command in WITHOUT_TRAINING else config,
        run_dirs=(config.run.dir,),
        summary=partial(summary, inputs, command, ranks),
        warning=without_effect(inputs, command),
    )


def _run(command: Command, inputs: Any, mesh: "Mesh", watchdog: "Watchdog") -> Any:
    """Do a job whose inputs could be read without Megatron, which is loaded here."""
    run: Callable[..., Any]
    match command:
        case "sft":
            from marlhf_mega.train.sft import run_sft as run
        case "reward":
            from marlhf_mega.train.reward import run_reward as run
        case "preference":
            from marlhf_mega.train.preference import run_preference as run
        case "ppo":
            from marlhf_mega.train.ppo import run_ppo as run
        case "offline":
            from marlhf_mega.train.offline import run_offline as run
        case "evaluate":
            from marlhf_mega.commands.evaluate import run_evaluate as run
        case "generate":
            from marlhf_mega.commands.generate import run_generate as run
        case "quickstart":
            from marlhf_mega.commands.quickstart import run_quickstart as run
    resume_collections()
    return run(inputs, mesh, watchdog)
