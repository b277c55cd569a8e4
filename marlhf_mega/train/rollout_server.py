"""What ranks that only generate do: answer the training ranks until these say that it is enough."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from marlhf_mega.checkpoint.reshard import connect_learning
from marlhf_mega.checkpoint.whole_tensors import WholeTensors
from marlhf_mega.config.schema import Config
from marlhf_mega.data.datasets import Prompt
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.resilience.fault_injection import Faults
from marlhf_mega.resilience.heartbeat import WAITING
from marlhf_mega.resilience.preemption import EarlyEndError
from marlhf_mega.resilience.watchdog import Watchdog
from marlhf_mega.rollout.assignment import block_of, gather_rollouts
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.protocol import ResponseGenerator
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.transport import Answer, End, Request
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.train.generation import start_vllm
from marlhf_mega.train.inputs import Inputs


def serve_rollouts(inputs: Inputs[Prompt], mesh: Mesh, watchdog: Watchdog) -> None:
    """Generate for the training ranks until they say that it is enough.

    Raises:
        EarlyEndError: they ended before the last step.
    """
    config = inputs.config
    generator, fresh_weights = _build(config, mesh, stop=StopRule.of(inputs.tokenizer))
    faults = Faults(mesh.launch.rank, config.run.dir)

    launch = mesh.launch
    first = launch.size - mesh.world_size
    while True:
        watchdog.enter(WAITING)
        request: Request | End = launch.broadcast(None, source=0)
        if isinstance(request, End):
            break
        watchdog.step = request.step + 1
        watchdog.enter("rollout")
        faults.enter(watchdog.step, "rollout")
        own = block_of(mesh, len(request.prompts), first=request.first)
        options = RolloutOptions.of(config, step=request.step, for_training=True)
        prompts = [request.prompts[i - request.first] for i in own]
        with fresh_weights():
            start = time.perf_counter()
            rollout = generator.generate(prompts, own, options)
        parts = gather_rollouts(rollout, mesh)
        answer = Answer(parts=parts, seconds=time.perf_counter() - start)
        watchdog.enter(WAITING)
        launch.broadcast(answer if mesh.rank == 0 else None, source=first)
    if request.code:
        raise EarlyEndError(request.code, request.reason)


def _build(
    config: Config, mesh: Mesh, *, stop: StopRule
) -> tuple[ResponseGenerator, Callable[[], AbstractContextManager[None]]]:
    """Build what generates, and what gets it the weights for the length of a `with` block."""
    if config.rollout.engine == "vllm":
        engine = start_vllm(config, mesh, stop=stop)
        weights = WholeTensors(None, config.model, mesh, receives=True)
        return engine, partial(engine.engine.filled, weights)
    chunks = build_chunks(config.model, config.precision, mesh, head="language", frozen=True)
    resharder = connect_learning(None, (chunks, mesh))

    @contextmanager
    def moved() -> Iterator[None]:
        resharder.move()
        yield

    graphs = config.rollout.cuda_graphs
    return Generator(chunks, mesh, stop=stop, cuda_graphs=graphs), moved
