"""A vLLM engine in the processes that train: start, fresh weights, requests, rest.

All that knows vLLM is here and in the modules beside it. Its `external_launcher` makes one engine
on every rank, which forms tensor-parallel groups of neighbouring ranks in the world that is there;
these groups are replicas that know nothing of each other. Read with vLLM 0.32.
"""

import gc
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.vllm_process import (
    import_vllm,
    keep_to_gloo,
    launched_as,
    unchanged_process,
)
from marlhf_mega.rollout.vllm_requests import (
    EngineRequest,
    EngineResponse,
    extend,
    sampling_params,
)

EMBEDDING_NAME = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an engine is started with."""

    max_tokens: int
    """Longest sequence."""
    slots: int
    """Most sequences that it decodes together."""
    cache_bytes: int
    """Its key-value cache on each rank."""
    eager: bool
    """Neither compile nor record graphs."""
    prefix_caching: bool
    """Keep keys and values of common beginnings of prompts."""
    verify_interval: int | None
    """Loads after which what has arrived is compared again; None: only the first time."""


class VllmEngine:
    """This rank's engine. All ranks of the world call every method but `complete`."""

    def __init__(
        self, config: Mapping[str, Any], dtype: torch.dtype, mesh: Mesh, options: EngineOptions
    ) -> None:
        """Start with weights that mean nothing.

        Args:
            config: the model's Hugging Face config.json.
            dtype: of weights and activations.
            mesh: of the world, whose tensor-parallel ranks are a replica.
            options: sizes.
        """
        self._on_gpu = mesh.platform.name == "cuda"
        self._tensor_rank, self._num_loads = mesh.tp_rank, 0
        self._verify_interval, self._eager = options.verify_interval, options.eager
        self._vocab_size = int(config["vocab_size"])
        with ExitStack() as stack:
            stack.enter_context(unchanged_process(eager=self._eager))
            stack.enter_context(launched_as(mesh))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="marlhf-vllm-")))
            (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
            if not self._on_gpu:
                import_vllm()
                keep_to_gloo()
            self._llm = _start(folder, dtype, mesh, options, on_gpu=self._on_gpu)
        # It would end the world, which is ours, with the engine.
        self._llm.llm_engine.engine_core._finalizer.detach()
        self.rest()

    @contextmanager
    def filled(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        """Load weights for the length of a `with` block, and rest afterwards.

        Args:
            weights: names and values of whole Hugging Face tensors, which the engine may keep.
        """
        if self._on_gpu:
            self._llm.wake_up(tags=["weights"])
        else:
            self._forget_packed_experts()
        self._load(weights)
        if self._on_gpu:
            self._llm.wake_up(tags=["kv_cache"])
        else:
            self._pack_tied_head()
        self._llm.reset_prefix_cache()
        try:
            yield
        finally:
            self.rest()

    def rest(self) -> None:
        """Give weights and cache back to the device, on GPUs: a CPU has no way to."""
        if self._on_gpu:
            self._llm.sleep(level=2)

    def complete(
        self, requests: Sequence[EngineRequest], *, rule: SamplingRule, stop: StopRule
    ) -> list[EngineResponse]:
        """Answer prompts. All ranks of a replica call it with the same arguments.

        Returns:
            A response to each, the end token included, with log-probs under the distribution that
            its tokens were drawn from.

        Raises:
            RuntimeError: more tokens than the engine was asked for are as likely as the k-th.
        """
        engine = self._llm.llm_engine
        found = [EngineResponse(tokens=[], logprobs=[]) for _ in requests]
        with unchanged_process(eager=self._eager):
            for number, request in enumerate(requests):
                params = sampling_params(request, rule, stop, vocab_size=self._vocab_size)
                prompt = {"type": "token", "prompt_token_ids": request.prompt}
                engine.add_request(str(number), prompt, params)
            running = set(range(len(requests)))
            while engine.has_unfinished_requests():
                for output in engine.step():
                    number = int(output.request_id)
                    if number not in running:
                        continue
                    extend(found[number], output.outputs[0], rule, stop)
                    if output.finished or stop.is_met(found[number].tokens):
                        running.remove(number)
                    if not output.finished and number not in running:
                        engine.abort_request([output.request_id])
        return found

    def end(self) -> None:
        """Free everything but the world, so that another engine can start."""
        from vllm.distributed import parallel_state

        core = self._llm.llm_engine.engine_core.engine_core
        core.structured_output_manager.clear_backend()
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None
        gc.unfreeze()
        del self._llm

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load weights; when it is time, look whether what can be compared has arrived."""
        expected: dict[str, Tensor] = {}
        interval = self._verify_interval
        is_due = self._num_loads % interval == 0 if interval else self._num_loads == 0
        arriving = _noting(weights, expected) if is_due else iter(weights)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": arriving})
        found = dict(self._model.named_parameters())
        for name, values in expected.items():
            if name not in found:  # a family has another name for it
                continue
            # Ranks share the rows of an embedding, and an engine pads them.
            first = self._tensor_rank * len(found[name]) if name == EMBEDDING_NAME else 0
            wanted = values[first : first + len(found[name])].to(found[name])
            if not torch.equal(found[name][: len(wanted)], wanted):
                raise RuntimeError(
                    f"rollout.engine=vllm: {name} must have its trained values in the engine; it "
                    "has others. Use rollout.engine=own, and report this with the version of vLLM."
                )
        self._num_loads += 1

    def _forget_packed_experts(self) -> None:
        """Let experts be packed again: on CPUs that is done with the first weights only."""
        for module in self._model.modules():
            method: Any = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                method.moe_kernel = None

    def _pack_tied_head(self) -> None:
        """Pack a head that shares its weights again: on CPUs loading packs the embedding alone."""
        head = getattr(self._model, "lm_head", None)
        if head is not None and hasattr(head, "quant_method"):
            head.quant_method.process_weights_after_loading(head)

    @property
    def _model(self) -> torch.nn.Module:
        core = self._llm.llm_engine.engine_core.engine_core
        model: torch.nn.Module = core.model_executor.driver_worker.worker.model_runner.model
        return model


def _noting(
    weights: Iterable[tuple[str, Tensor]], noted: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield weights, and keep those that an engine holds as they are: the rest it may pack."""
    for name, values in weights:
        if name == EMBEDDING_NAME or name.endswith("norm.weight"):
            noted[name] = values
        yield name, values


def _start(
    folder: Path, dtype: torch.dtype, mesh: Mesh, options: EngineOptions, *, on_gpu: bool
) -> Any:
    return import_vllm().LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=str(dtype).removeprefix("torch."),
        tensor_parallel_size=mesh.tp_size,
        distributed_executor_backend="external_launcher",
        max_model_len=options.max_tokens,
        max_num_seqs=options.slots,
        kv_cache_memory_bytes=options.cache_bytes,
        # Bytes are given: it only has to be free.
        gpu_memory_utilization=0.01,
        enforce_eager=options.eager,
        enable_prefix_caching=options.prefix_caching,
        enable_sleep_mode=on_gpu,
        logprobs_mode="processed_logprobs",
        max_logprobs=-1,
        disable_log_stats=True,
        seed=0,
    )
