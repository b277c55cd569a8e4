"""Where the samples of a PPO step come from: the training ranks, or ranks that only generate."""

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from marlhf_mega.checkpoint.reshard import connect
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.data.stream import SampleStream
from marlhf_mega.models.gpt import StageModel, build_chunks
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.deal import balance, pick
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.remote import Answer, End, RemoteGenerator, Request, serve
from marlhf_mega.rollout.reshard import ReshardedGenerator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.types import Rollout
from marlhf_mega.train.beats import WAITING
from marlhf_mega.train.build import build_generator, generator_in_place
from marlhf_mega.train.faults import Faults
from marlhf_mega.train.inputs import Inputs
from marlhf_mega.train.stop import EarlyEndError
from marlhf_mega.train.watchdog import Watchdog
from marlhf_mega.update.ppo import local_indices


def create_rollouts(
    inputs: Inputs[Prompt], mesh: Mesh, policy: Sequence[StageModel], *, num_steps: int
) -> "Rollouts":
    """Return what the configuration asks for. All ranks that train call it.

    Args:
        inputs: of the run.
        mesh: where this rank stands in training.
        policy: this rank's chunks of the weights that are trained.
        num_steps: PPO steps of the run.
    """
    kind = SeparateRollouts if inputs.config.rollout.ranks else Rollouts
    return kind(inputs, mesh, policy, num_steps=num_steps)


class Rollouts:
    """Draws the prompts of every step; the training ranks answer them when it begins."""

    generator: Generator | ReshardedGenerator
    """Generates on the training ranks; evaluations use it too."""

    def __init__(
        self, inputs: Inputs[Prompt], mesh: Mesh, policy: Sequence[StageModel], *, num_steps: int
    ) -> None:
        self.config, self.mesh, self.num_steps = inputs.config, mesh, num_steps
        self._train, self._eos_id = inputs.train, inputs.tokenizer.eos_id
        settings = self.config.rollout
        self._stream = SampleStream(
            num_samples=len(inputs.train),
            batch_size=settings.batch_size // settings.samples_per_prompt,
            seed=self.config.run.seed,
            shuffle=self.config.data.shuffle,
            data_hash=inputs.data_hash,
        )
        self._connect(policy)

    def next(self, step: int) -> tuple[list[Prompt], Rollout]:
        """Return this replica's share of a step's samples, and their prompts."""
        prompts = self._prompts(self._stream.next_batch().tolist())
        own = self._own_indices()
        token_ids = [prompts[i].prompt_ids for i in own]
        return self._deal(prompts, generate(self.generator, token_ids, own, self.config, step=step))

    def settle(self) -> None:
        """Wait for what is under way, before a checkpoint; here nothing ever is."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs for the same samples to follow."""
        return {"stream": self._stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._stream.load_state_dict(state["stream"])
        waiting = state.get("waiting")
        if waiting is not None and not self._take(waiting):
            # Their prompts are drawn again.
            self._stream.num_consumed -= len(waiting["rows"])

    def work_seconds(self, phase_seconds: float) -> tuple[float, int]:
        """Return the seconds of the last generation and how many ranks took part.

        Args:
            phase_seconds: how long the training ranks were in the rollout phase.
        """
        return phase_seconds, self.mesh.world_size

    def metrics(self) -> dict[str, float]:
        """Return what the last step's samples cost besides the time of the phase."""
        if self._mover is None:
            return {}
        return {
            "time/reshard_seconds": self._mover.seconds,
            "rollout/reshard_gib": self._mover.total_bytes / 2**30,
        }

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let go, at the end of a `with` block, of whoever else generates."""
        yield

    def _take(self, waiting: Mapping[str, Any]) -> bool:
        """Keep samples of a checkpoint that wait for their step, if this run can train on them."""
        return False

    def _connect(self, policy: Sequence[StageModel]) -> None:
        self.generator, self._mover = build_generator(
            policy, self.config, self.mesh, eos_id=self._eos_id
        )

    def _prompts(self, rows: Sequence[int]) -> list[Prompt]:
        """Return the prompt of every sample of a batch."""
        often = range(self.config.rollout.samples_per_prompt)
        return [self._train[row] for row in rows for _ in often]

    def _own_indices(self) -> list[int]:
        size = self.config.ppo.minibatch_size
        return local_indices(self.config.rollout.batch_size, size, self.mesh)

    def _deal(self, prompts: list[Prompt], rollout: Rollout) -> tuple[list[Prompt], Rollout]:
        if self.config.ppo.microbatch_tokens is not None:
            size = self.config.ppo.minibatch_size
            rollout = balance(rollout, minibatch_size=size, mesh=self.mesh)
        return [prompts[i] for i in rollout.sample_indices], rollout


class SeparateRollouts(Rollouts):
    """Other ranks generate; with staleness 1 the next step's samples while this one is trained on.

    The samples of step k come from the weights before step k - staleness, however fast either side
    is, so that a run is the same every time.
    """

    _rows: list[int] | None
    """Rows of the prompts that are asked for or answered, and not trained on yet."""
    _answer: Answer | None

    def next(self, step: int) -> tuple[list[Prompt], Rollout]:
        """Return this replica's share of a step's samples, and have the next ones begun."""
        if self._rows is None:
            self._ask(step)
        self.settle()
        rows, answer = self._rows, self._answer
        assert rows is not None
        assert answer is not None
        self._rows = self._answer = None
        self._seconds = answer.seconds
        if self.config.rollout.staleness and step + 1 < self.num_steps:
            self._ask(step + 1)
        rollout = pick(answer.parts, self._own_indices(), self.mesh.device)
        return self._deal(self._prompts(rows), rollout)

    def settle(self) -> None:
        """Wait for what is under way, before a checkpoint."""
        if self._rows is not None and self._answer is None:
            self._answer = self._remote.answer()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, samples that wait for their step included."""
        waiting = None
        if self._rows is not None:
            assert self._answer is not None, "settled before"
            waiting = {"rows": self._rows, **_to_json(self._answer)}
        return {**super().state_dict(), "waiting": waiting}

    def work_seconds(self, phase_seconds: float) -> tuple[float, int]:
        """Return the seconds that the other ranks took, and their number."""
        return self._seconds, self._remote.num_ranks

    def metrics(self) -> dict[str, float]:
        """Add how long the other ranks generated, and how old the weights were in PPO steps."""
        own = {
            "time/generation_seconds": self._seconds,
            "rollout/staleness": float(self.config.rollout.staleness),
        }
        return super().metrics() | own

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let the other ranks end as this one does, unless it fails: then the launcher ends all."""
        try:
            yield
        except EarlyEndError as error:
            self.settle()
            self._remote.end(End(code=error.code, reason=str(error)))
            raise
        self._remote.end(End(code=0, reason=""))

    def _take(self, waiting: Mapping[str, Any]) -> bool:
        prompts = [prompt.prompt_ids for prompt in self._prompts(waiting["rows"])]
        # The number of samples may have been allowed to change.
        sizes = (len(prompts), len(waiting["responses"]))
        if sizes != (self.config.rollout.batch_size,) * 2:
            return False
        self._rows, self._answer = waiting["rows"], _from_json(waiting, prompts)
        return True

    def _connect(self, policy: Sequence[StageModel]) -> None:
        self.generator = generator_in_place(policy, self.config, self.mesh, eos_id=self._eos_id)
        self._mover = connect((policy, self.mesh), None)
        self._remote = RemoteGenerator(self._mover, self.mesh)
        self._rows = self._answer = None
        self._seconds = 0.0

    def _ask(self, step: int) -> None:
        self._rows = rows = self._stream.next_batch().tolist()
        prompts = [prompt.prompt_ids for prompt in self._prompts(rows)]
        self._remote.ask(Request(step=step, prompts=prompts))


def serve_rollouts(inputs: Inputs[Prompt], mesh: Mesh) -> None:
    """Generate for the training ranks until they say that it is enough.

    Raises:
        EarlyEndError: they ended before the last step.
    """
    config = inputs.config
    chunks = build_chunks(config.model, config.precision, mesh, head="language")
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
    mover = connect(None, (chunks, mesh))
    generator = Generator(
        chunks, mesh, eos_id=inputs.tokenizer.eos_id, cuda_graphs=config.rollout.cuda_graphs
    )
    # The training ranks hear it too; they save first, and then say so.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    faults, watchdog = Faults(mesh.launch.rank, config.run.dir), Watchdog(config, mesh)

    def enter(step: int | None) -> None:
        if step is None:
            watchdog.enter(WAITING)
            return
        watchdog.step = step + 1
        watchdog.enter("rollout")
        faults.enter(step + 1, "rollout")

    def answer(request: Request, own: Sequence[int]) -> Rollout:
        prompts = [request.prompts[i] for i in own]
        return generate(generator, prompts, own, config, step=request.step)

    with watchdog:
        end = serve(mover, mesh, answer, enter=enter)
    if end.code:
        raise EarlyEndError(end.code, end.reason)


def generate(
    generator: Generator | ReshardedGenerator,
    prompts: Sequence[list[int]],
    indices: Sequence[int],
    config: Config,
    *,
    step: int,
    slots: int | None = None,
) -> Rollout:
    """Answer some of a PPO step's samples as the configuration says.

    Args:
        generator: of any layout.
        prompts: token ids.
        indices: global index of every sample.
        config: of the run.
        step: PPO step, from 0.
        slots: sequences decoded together; none: `rollout.slots`.
    """
    settings = config.rollout
    rule = SamplingRule(
        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    return generator.generate(
        prompts,
        list(indices),
        rule=rule,
        max_response_tokens=settings.max_response_tokens,
        seed=config.run.seed,
        step=step,
        slots=slots or settings.slots,
    )


def _to_json(answer: Answer) -> dict[str, Any]:
    samples = range(sum(len(part.responses) for part in answer.parts))
    rollout = pick(answer.parts, samples, torch.device("cpu"))
    lengths = [len(response) for response in rollout.responses]
    # A float32 is exact as JSON: it is written with all digits of a double.
    logprobs = [row[:n].tolist() for row, n in zip(rollout.logprobs, lengths, strict=True)]
    return {
        "responses": rollout.responses,
        "finished": rollout.finished,
        "logprobs": logprobs,
        "seconds": answer.seconds,
    }


def _from_json(state: Mapping[str, Any], prompts: list[list[int]]) -> Answer:
    logprobs = [torch.tensor(row) for row in state["logprobs"]]
    rollout = Rollout(
        prompts=prompts,
        responses=state["responses"],
        finished=state["finished"],
        sample_indices=list(range(len(prompts))),
        logprobs=pad_sequence(logprobs, batch_first=True),
    )
    return Answer(parts=[rollout], seconds=state["seconds"])
