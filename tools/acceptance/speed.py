"""The steps that measure: decoding, attention, training, copies."""

import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from counting import count
from sizes import Found, Sizes, one_rank, policy, seconds
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from marlhf_mega.algorithm.losses import sft_loss
from marlhf_mega.config import limits
from marlhf_mega.config.sections.training import OptimizerConfig
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.metrics.flops import forward_flops, peak_flops, training_flops
from marlhf_mega.models.forward import logprob_forward, make_batches
from marlhf_mega.models.gpt import StageModel
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.schedule import pipeline_forward_backward
from marlhf_mega.parallel.vocab import VocabShard, vocab_parallel_logprobs
from marlhf_mega.platform.cuda_graphs import GraphRecorder
from marlhf_mega.platform.host_memory import host_buffer
from marlhf_mega.rollout.decoder import ChunkDecoder, generating
from marlhf_mega.rollout.generator import Generator
from marlhf_mega.rollout.sampling import SamplingRule
from marlhf_mega.rollout.stops import StopRule
from marlhf_mega.rollout.types import RolloutOptions
from marlhf_mega.rollout.work import Decode

MICROBATCHES = 4
HEAD_CHUNKS = (24, 26, 28)
"""Binary logarithms of the logits of a chunk."""
NEW_WIDTHS = (0, 4, 8, 12)
"""Tokens more than a round width: each is a shape that attention has not seen."""


def decode(sizes: Sizes) -> Found:
    """Time and launches of a decoded token of the whole batch, with and without CUDA graphs."""
    found: Found = {}
    with one_rank() as mesh:
        chunks = policy(sizes, mesh)
        for batch in sizes.decode_batches:
            for graphs in (False, True) if mesh.platform.name == "cuda" else (False,):
                name = f"batch_{batch}{'_graphs' if graphs else ''}"
                found[name] = _decoded_token(sizes, mesh, chunks, batch, graphs=graphs)
    return found


def _decoded_token(
    sizes: Sizes, mesh: Mesh, chunks: list[StageModel], batch: int, *, graphs: bool
) -> Found:
    generator = Generator(chunks, mesh, stop=StopRule(), cuda_graphs=graphs)
    prompts = _tokens(sizes, batch, sizes.prompt_tokens)

    def generate(tokens: int) -> None:
        rule = SamplingRule(temperature=1.0)
        options = RolloutOptions(rule=rule, max_response_tokens=tokens, seed=0, step=0, slots=None)
        generator.generate(prompts, range(batch), options)

    new = sizes.new_tokens
    generate(new)
    first, all_of_them = (
        min(seconds(partial(generate, n), mesh.platform, repeats=2)) for n in (1, new)
    )
    per_token = (all_of_them - first) / (new - 1)
    counts = [count(partial(generate, n), mesh.platform) for n in (1, new)]
    return {
        "ms": round(1000 * per_token, 3),
        "tokens_per_s": round(batch / per_token),
        **counts[1].per_repeat(counts[0], new - 1),
    }


def attention(sizes: Sizes) -> Found:
    """Forward and backward by each kernel of torch, and the first call at widths that are new."""
    batch, heads, channels = sizes.attention
    found: Found = {}
    with one_rank() as mesh:

        def run(kernel: SDPBackend, width: int) -> None:
            inputs = torch.randn(
                *(3, batch, heads, width, channels), device=mesh.device, dtype=torch.bfloat16
            ).requires_grad_()
            with sdpa_kernel(kernel):
                F.scaled_dot_product_attention(
                    inputs[0], inputs[1], inputs[2], is_causal=True
                ).sum().backward()

        kernels = ("MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")
        for name in kernels:
            work = partial(run, getattr(SDPBackend, name))
            widths = [sizes.train_tokens + more for more in NEW_WIDTHS]
            try:
                first = [seconds(partial(work, w), mesh.platform, repeats=1)[0] for w in widths]
            except RuntimeError as error:
                found[name.lower()] = f"not here: {str(error).splitlines()[0]}"
                continue
            again = seconds(partial(work, widths[0]), mesh.platform)
            found[name.lower()] = {
                "ms": round(1000 * min(again), 3),
                "first_ms_at_new_widths": [round(1000 * s, 1) for s in first],
            }
    return found


def training(sizes: Sizes) -> Found:
    """An optimizer step, its longest kernels, and the log-prob head with chunks of three sizes."""
    return train_step(sizes) | {"head": _head(sizes)}


def train_step(sizes: Sizes, *, fp8: str = "off") -> Found:
    """Time cross entropy on every token, forward, backward and optimizer."""
    with one_rank() as mesh:
        state = TrainState(policy(sizes, mesh, fp8=fp8), OptimizerConfig(), total_steps=10)
        prompts = _tokens(sizes, sizes.train_batch, 1)
        responses = _tokens(sizes, sizes.train_batch, sizes.train_tokens - 1)
        limit = MicrobatchLimit(sequences=sizes.train_batch // MICROBATCHES)
        batches = make_batches(prompts, responses, limit=limit, mesh=mesh)

        def step() -> None:
            state.zero_grad()
            pipeline_forward_backward(
                state.chunks,
                batches.microbatches,
                logprob_forward,
                lambda output, part: sft_loss(output[0], part.batch.response_mask),
            )
            state.step()

        mesh.platform.reset_memory_peak()
        step()
        taken = statistics.median(seconds(step, mesh.platform))
        counts = count(step, mesh.platform)
        tokens = sizes.train_batch * sizes.train_tokens
        flops = training_flops(
            sizes.model,
            forward_flops(
                sizes.model,
                [sizes.train_tokens] * sizes.train_batch,
                output_size=sizes.model.vocab_size or 0,
                output_tokens=tokens - sizes.train_batch,
            ),
        )
        peak = peak_flops(mesh.platform.device_name)
        return {
            "ms": round(1000 * taken, 1),
            "tokens_per_s": round(tokens / taken),
            "flops_per_s": flops / taken,
            "mfu": None if peak is None else round(flops / taken / peak, 3),
            "peak_memory_bytes": mesh.platform.memory_peak(),
            "launches": counts.launches,
            "waits": counts.waits,
            "kernels_ms": counts.kernels,
        }


def _head(sizes: Sizes) -> Found:
    tokens, hidden_size, vocabulary = sizes.head
    found: Found = {}
    usual = limits.LOGITS_CHUNK_ELEMENTS
    with one_rank() as mesh:
        padded = limits.padded_vocab_size(vocabulary, 1)
        shard = VocabShard.of(mesh, vocab_size=vocabulary, padded_size=padded)
        hidden, weight = (
            torch.randn(n, hidden_size, device=mesh.device, dtype=torch.bfloat16).requires_grad_()
            for n in (tokens, padded)
        )
        targets = torch.randint(vocabulary, (tokens,), device=mesh.device)

        def run() -> tuple[Tensor, ...]:
            outputs = vocab_parallel_logprobs(hidden, weight, targets, shard=shard)
            return torch.autograd.grad(torch.stack(outputs).sum(), (hidden, weight))

        try:
            for logarithm in HEAD_CHUNKS:
                limits.LOGITS_CHUNK_ELEMENTS = 1 << logarithm
                run()
                mesh.platform.reset_memory_peak()
                taken = min(seconds(run, mesh.platform))
                found[f"chunk_2^{logarithm}"] = {
                    "us_per_token": round(1e6 * taken / tokens, 3),
                    "peak_memory_bytes": mesh.platform.memory_peak(),
                }
        finally:
            limits.LOGITS_CHUNK_ELEMENTS = usual
    return found


def copies(sizes: Sizes) -> Found:
    """Bytes per second to the host, by the memory there; and what recording a CUDA graph costs."""
    with one_rank() as mesh, tempfile.TemporaryDirectory() as folder:
        source = torch.zeros(sizes.copied_bytes, dtype=torch.uint8, device=mesh.device)
        buffer = host_buffer(sizes.copied_bytes, mesh.platform, Path(folder))
        ways = {
            "fresh_pageable": source.clone if mesh.platform.name == "cpu" else source.cpu,
            "registered": partial(buffer.write, 0, source),
            "registered_back": partial(buffer.read, 0, source),
        }
        found: Found = {
            f"{name}_bytes_per_s": sizes.copied_bytes / min(seconds(way, mesh.platform))
            for name, way in ways.items()
        }
        if mesh.platform.name == "cuda":
            found["graph_capture_ms"] = round(1000 * _capture_seconds(sizes, mesh), 1)
    return found


def _capture_seconds(sizes: Sizes, mesh: Mesh) -> float:
    chunks, batch = policy(sizes, mesh), sizes.decode_batches[0]
    longest = sizes.prompt_tokens + sizes.new_tokens
    decoder = ChunkDecoder(chunks[0], num_slots=batch, max_tokens=longest)
    work = Decode(
        tokens=torch.zeros(batch, 1, dtype=torch.int64, device=mesh.device),
        positions=torch.zeros(batch, dtype=torch.int64, device=mesh.device),
        longest=longest,
    )
    step = partial(decoder.run, work, None)
    with generating(chunks):
        step()
        return min(seconds(partial(GraphRecorder(), step), mesh.platform))


def _tokens(sizes: Sizes, rows: int, width: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = sizes.model.vocab_size or 0
    return torch.randint(3, vocabulary, (rows, width), generator=generator).tolist()
