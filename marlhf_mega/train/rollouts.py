"""The samples of every PPO step: prompts from the data stream, responses by a transport."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from marlhf_mega.data.datasets import Prompt
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.preemption import EarlyEndError
from marlhf_mega.rollout.assignment import balance, own_samples, select
from marlhf_mega.rollout.remote import RolloutTransport
from marlhf_mega.rollout.transport import Answer, End, Request
from marlhf_mega.rollout.types import Rollout
from marlhf_mega.train.inputs import Inputs


class Rollouts:
    """Draws the prompts of every step and asks for their responses.

    With `rollout.staleness=1` the next step's samples are asked for while this one's are trained
    on. The samples of step k come from the weights before step k - staleness, however fast either
    side is, so that a run is the same every time.
    """

    def __init__(
        self, inputs: Inputs[Prompt], transport: RolloutTransport, mesh: Mesh, *, num_steps: int
    ) -> None:
        """Ask for nothing yet.

        Args:
            inputs: configuration and prompts.
            transport: brings the responses.
            mesh: this rank's mesh in training.
            num_steps: PPO steps of the run.
        """
        self.config, self.mesh, self.num_steps = inputs.config, mesh, num_steps
        self._train, self._transport = inputs.train, transport
        settings = self.config.rollout
        self._stream = inputs.stream(settings.batch_size // settings.samples_per_prompt)
        self._asked: list[int] | None = None
        """Data rows of the prompts that are asked for and not trained on yet."""
        self._answer: Answer | None = None
        self.generation_seconds = 0.0
        """How long generating the last samples took."""

    @property
    def num_generating_ranks(self) -> int:
        """Ranks that generate."""
        return self._transport.num_ranks

    def next(self, step: int) -> tuple[list[Prompt], Rollout]:
        """Return this replica's share of a step's samples, and their prompts."""
        if self._asked is None:
            self._ask(step)
        rows, answer = self._take()
        self.generation_seconds = answer.seconds
        if self.config.rollout.staleness and step + 1 < self.num_steps:
            self._ask(step + 1)
        return self._share(rows, answer)

    def more(self, step: int, num_prompts: int, *, first: int) -> tuple[list[Prompt], Rollout]:
        """Return this replica's share of further samples of a step, and their prompts.

        Args:
            step: of the run.
            num_prompts: next prompts of the data that are answered.
            first: global index of their first sample.
        """
        self._ask(step, num_prompts, first=first)
        rows, answer = self._take()
        self.generation_seconds += answer.seconds
        return self._share(rows, answer, first=first)

    def wait(self) -> None:
        """Wait for samples that are being generated, as before a checkpoint."""
        if self._asked is not None and self._answer is None:
            self._answer = self._transport.answer()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, samples that wait for their step included."""
        state: dict[str, Any] = {"stream": self._stream.state_dict()}
        if self._asked is not None:
            assert self._answer is not None, "waited for before"
            state["waiting"] = {"rows": self._asked, **self._answer.state_dict()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from where `state` was taken."""
        self._stream.load_state_dict(state["stream"])
        waiting = state.get("waiting")
        if waiting is None:
            return
        prompts = [prompt.prompt_ids for prompt in self._prompts(waiting["rows"])]
        sizes = {len(prompts), len(waiting["responses"]), self.config.rollout.batch_size}
        if self.config.rollout.ranks and len(sizes) == 1:
            self._asked, self._answer = waiting["rows"], Answer.from_state(waiting, prompts)
        else:
            # The number of samples has been allowed to change: their prompts are drawn again.
            self._stream.num_consumed -= len(waiting["rows"])

    def metrics(self) -> dict[str, float]:
        """Return what the last samples cost besides the time of the phase."""
        metrics = self._transport.metrics()
        if self.config.rollout.ranks:
            metrics["rollout/staleness"] = float(self.config.rollout.staleness)
        return metrics

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let other ranks that generate end as this one does.

        If this one fails they are left waiting: the launcher ends all.
        """
        try:
            yield
        except EarlyEndError as error:
            self.wait()
            self._transport.end(End(code=error.code, reason=str(error)))
            raise
        self._transport.end(End(code=0, reason=""))

    def _ask(self, step: int, num_prompts: int | None = None, *, first: int = 0) -> None:
        self._asked = self._stream.next_batch(num_prompts).tolist()
        prompts = [prompt.prompt_ids for prompt in self._prompts(self._asked)]
        self._transport.ask(Request(step=step, prompts=prompts, first=first))

    def _take(self) -> tuple[list[int], Answer]:
        """Return the data rows that were asked for last, and the answer."""
        self.wait()
        rows, answer = self._asked, self._answer
        assert rows is not None
        assert answer is not None
        self._asked = self._answer = None
        return rows, answer

    def _share(
        self, rows: Sequence[int], answer: Answer, *, first: int = 0
    ) -> tuple[list[Prompt], Rollout]:
        """Return this replica's samples of an answer; balanced, unless a filter comes first."""
        prompts = self._prompts(rows)
        own = own_samples(self.config, self.mesh, len(prompts), first=first)
        rollout = select(answer.parts, own, self.mesh.device)
        ppo = self.config.ppo
        if self.config.rollout.filter is None and ppo.microbatch_tokens is not None:
            rollout = balance(rollout, minibatch_size=ppo.minibatch_size, mesh=self.mesh)
        return [prompts[i - first] for i in rollout.sample_indices], rollout

    def _prompts(self, rows: Sequence[int]) -> list[Prompt]:
        """Return the prompt of every sample of a batch."""
        often = range(self.config.rollout.samples_per_prompt)
        return [self._train[row] for row in rows for _ in often]
