"""One stage chunk of a decoder-only transformer, with a language or a scalar head on the last.

Built from Megatron-Core's embedding, transformer block and vocabulary-parallel layers rather than
from its GPTModel: the head works on the hidden states of response tokens only, never materialises
all logits, and may be a scalar head (critic, reward model) at any pipeline layout.
"""

from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from marlhf_mega.config.limits import padded_vocab_size, round_up
from marlhf_mega.config.model import Head, ModelConfig
from marlhf_mega.config.sections.hardware import MemoryConfig, PrecisionConfig
from marlhf_mega.models.adapter_dropout import token_keys
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.last_layer_pruning import LastLayerPruning, can_prune
from marlhf_mega.models.latent_head import LatentHead
from marlhf_mega.models.lora import adapter_state_dict, attach, freeze_others
from marlhf_mega.models.packing import Packing
from marlhf_mega.models.rope import inverse_frequencies, rotation_angles
from marlhf_mega.models.routing import Replay
from marlhf_mega.models.spec import block_spec, transformer_config
from marlhf_mega.parallel.context import ContextShare
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.vocab import VocabShard, vocab_parallel_logprobs


@dataclass(frozen=True)
class _OwnTokens:
    """The tokens of a batch that this rank computes on; all without context parallelism."""

    tokens: Tensor
    """[batch, seq/cp] int64."""
    positions: Tensor
    """[seq/cp] int64: their positions in their sequences."""
    packing: Packing
    """Where the sequences of a row end, and which tokens these are."""

    @property
    def share(self) -> ContextShare | None:
        """Which tokens of the row these are; None means all."""
        return self.packing.share

    def find(self, batch: SequenceBatch, shift: int) -> tuple[Tensor, Tensor | slice]:
        """Locate the hidden states that belong to real response tokens.

        Args:
            batch: the whole batch.
            shift: 0 for the state at a response token, -1 for the state before it.

        Returns:
            [chosen] int64, indices into the [seq/cp * batch] states of this rank; which of the
            batch's real response tokens these are.
        """
        columns, rows = batch.token_columns + shift, batch.token_rows
        chosen: Tensor | slice = slice(None)
        if self.share is not None:
            chosen, columns = self.share.find(columns)
            rows = rows[chosen]
        return columns * len(self.tokens) + rows, chosen


class StageModel(LanguageModule):
    """The layers between two pipeline boundaries, plus embedding and head where they belong."""

    rotary_speeds: Tensor

    def __init__(
        self,
        model: ModelConfig,
        precision: PrecisionConfig,
        mesh: Mesh,
        *,
        head: Head,
        chunk: int,
        memory: MemoryConfig,
        length_head: bool = False,
        latent_size: int = 0,
    ) -> None:
        """Allocate parameters without filling them; `marlhf_mega.checkpoint.weights` does that.

        Args:
            model: the architecture, with its vocabulary size.
            precision: number formats.
            mesh: this rank's mesh.
            head: `language` for policy and reference, `scalar` for critic and reward.
            chunk: which of this rank's virtual pipeline stages.
            memory: what is recomputed in the backward pass.
            length_head: a scalar head has a second one beside it, see `ScalarHead`.
            latent_size: of the latent per user; 0 means that a scalar head knows of no users.
        """
        assert model.vocab_size is not None
        config = transformer_config(model, precision, mesh, memory)
        super().__init__(config, mesh.groups)
        self.model, self.head = model, head
        self.has_adapters = False
        self.base_digest: str | None = None
        """Hash of the frozen weights, where only adapters and a scalar head learn."""
        self.dropout_seed: Tensor | None = None
        """Set inside `dropping`."""
        # FP8 products need an aligned number of tokens on every rank that shares a sequence.
        self.token_multiple = precision.fp8_alignment
        if config.sequence_parallel:
            self.token_multiple *= mesh.tp_size
        self.context = mesh.groups.cp if mesh.cp_size > 1 else None
        self.context_multiple = mesh.context_multiple
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = chunk if mesh.num_chunks > 1 else None
        self.pre_process = mesh.is_first_stage and chunk == 0
        self.post_process = mesh.is_last_stage and chunk == mesh.num_chunks - 1
        self.share_embeddings_and_output_weights = model.tied_embeddings and head == "language"
        padded = padded_vocab_size(model.vocab_size, mesh.tp_size)
        self.vocab_shard = VocabShard.of(mesh, vocab_size=model.vocab_size, padded_size=padded)
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded,
                max_sequence_length=model.max_positions,
                position_embedding_type="rope",
                tp_group=mesh.groups.tp,
            )
        num_layers = model.num_layers // (mesh.pp_size * mesh.num_chunks)
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(model, mesh, num_layers, config.params_dtype),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=mesh.groups,
            vp_stage=self.vp_stage,
        )
        self.register_buffer(
            "rotary_speeds", inverse_frequencies(model).to(mesh.device), persistent=False
        )
        if self.post_process:
            self.output_layer = self._build_head(padded, mesh, length_head, latent_size)
        self._prunes = self.post_process and can_prune(config)
        if self._prunes:
            LastLayerPruning(self.decoder.layers[-1])
        if model.num_experts is not None:
            for index, layer in enumerate(self.decoder.layers):
                Replay(layer, index)
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()
        _mark_sharded_weights(self)

    def _build_head(
        self, padded_vocab: int, mesh: Mesh, length_head: bool, latent_size: int
    ) -> torch.nn.Module:
        if latent_size:
            return LatentHead(self.config, mesh, size=latent_size)
        if self.head == "scalar":
            return ScalarHead(self.config, mesh, length_head=length_head)
        # Its product in training is our own; Megatron's would look for NVIDIA's apex.
        config = copy(self.config)
        config.gradient_accumulation_fusion = False
        return tensor_parallel.ColumnParallelLinear(
            config.hidden_size,
            padded_vocab,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process
            and self.share_embeddings_and_output_weights,
            tp_group=mesh.groups.tp,
        )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous stage's activations; the pipeline schedule calls it."""
        single = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(single)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return embeddings [seq, batch, hidden], [seq/tp, ...] with sequence parallelism.

        Ids beyond the vocabulary are embedded as id 0, at any layout.
        """
        # A policy with a larger vocabulary may sample ids that a reward model does not have.
        known = tokens < self.vocab_shard.num_total
        hidden: Tensor = self.embedding(input_ids=tokens * known, position_ids=None)
        if self.model.embedding_scale:
            # The factor is rounded to the weights' dtype first, as in Gemma's training.
            hidden = hidden * torch.tensor(self.model.hidden_size**0.5, dtype=hidden.dtype)
        if self.has_adapters and torch.is_grad_enabled():
            # Layers that are recomputed learn only if what they get has a gradient.
            hidden.requires_grad_()
        return hidden

    def forward(
        self,
        batch: SequenceBatch,
        *,
        temperature: float = 1.0,
        filtered: bool = False,
        replayed: bool = False,
        shift: int = -1,
        with_length: bool = False,
        last_states: bool = False,
    ) -> Tensor:
        """Run the chunk; all stages are called with the same batch.

        Args:
            batch: the sequences.
            temperature: divides the logits of a language head.
            filtered: a language head renormalises over the tokens that the sampler kept.
            replayed: tokens go to the experts that `batch.routing` names.
            shift: for a scalar head: -1 reads the state before each response token (critic), 0 the
                state at that token (reward model).
            with_length: give the scores of the length head as well.
            last_states: leave the head out.

        Returns:
            Before the last chunk: activations [seq, batch, hidden]. Language head: float32
            [2, batch, response], log-probs of the response tokens and entropies; [3, batch,
            response] if `filtered`, with the log-probs over the whole vocabulary. Scalar head:
            float32 [batch, response]; [2, batch, response] if `with_length`. With `last_states`:
            float32 [batch, hidden], the states at the last response tokens.
        """
        own = self._own_tokens(batch)
        if replayed:
            own = replace(own, packing=replace(own.packing, routing=self._own_routing(batch, own)))
        if not self.post_process:
            return self._run_layers(own)
        if last_states:
            return self._last_states(batch, own)
        is_language = self.head == "language"
        indices, chosen = own.find(batch, -1 if is_language else shift)
        states = self._states(own, indices, sum_gradients=is_language)
        if is_language:
            kept = batch.kept if filtered else None
            assert kept is not None or not filtered, "the sampler's masks are not there"
            outputs = vocab_parallel_logprobs(
                states,
                self.head_weight(),
                batch.response_tokens[chosen],
                shard=self.vocab_shard,
                temperature=temperature,
                softcap=self.model.logits_softcap,
                kept=kept if kept is None or isinstance(chosen, slice) else kept[chosen.cpu()],
            )
            grid = torch.stack([batch.to_grid(values, chosen) for values in outputs])
        elif with_length:
            assert isinstance(self.output_layer, ScalarHead)
            both = self.output_layer.both(states).unbind(1)
            grid = torch.stack([batch.to_grid(values, chosen) for values in both])
        else:
            grid = batch.to_grid(self.output_layer(states), chosen)
        return grid if own.share is None else own.share.sum(grid)

    def _last_states(self, batch: SequenceBatch, own: _OwnTokens) -> Tensor:
        indices, chosen = own.find(batch, 0)
        rows = batch.grid_rows[chosen]
        is_last = batch.grid_columns[chosen] + 1 == batch.response_lengths[rows]
        states = self._states(own, indices[is_last], sum_gradients=False).float()
        whole = states.new_zeros(len(batch.response_lengths), states.shape[-1])
        found = whole.index_put((rows[is_last],), states)
        return found if own.share is None else own.share.sum(found)

    @torch.no_grad()
    def states(self, batch: SequenceBatch) -> Tensor:
        """Return the last layer's states at the response tokens; never for training.

        Returns:
            Before the last chunk: activations. Last chunk: [batch, response, hidden].
        """
        own = self._own_tokens(batch)
        if not self.post_process:
            return self._run_layers(own)
        indices, chosen = own.find(batch, 0)
        grid = batch.to_grid(self._states(own, indices, sum_gradients=False), chosen)
        return grid if own.share is None else own.share.sum(grid)

    @torch.no_grad()
    def logits(self, batch: SequenceBatch) -> Tensor:
        """Compute all logits, to compare them with those of other programs; never for training.

        Returns:
            Before the last chunk: activations. Last chunk: float32 [batch, seq, vocab/tp], padding
            of the vocabulary included.
        """
        own = self._own_tokens(batch)
        hidden = self._run_layers(own)
        if not self.post_process:
            return hidden
        whole = self._gather_sequence(hidden, sum_gradients=False)
        if own.share is not None:
            whole = own.share.gather(whole)
        whole = whole[: batch.tokens.shape[1]]
        logits = torch.nn.functional.linear(whole, self.head_weight()).float().transpose(0, 1)
        cap = self.model.logits_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _own_tokens(self, batch: SequenceBatch) -> _OwnTokens:
        tokens = self._aligned(batch.tokens)
        width, device = tokens.shape[1], tokens.device
        lengths = (width,) if batch.lengths is None else batch.lengths
        packing = Packing.of(lengths, width=width, device=device, context=self.context)
        if self.dropout_seed is not None:
            keys = token_keys(batch, packing, self.dropout_seed)
            packing = replace(packing, dropout_keys=keys)
        if packing.share is None:
            return _OwnTokens(tokens, packing.positions, packing)
        indices = packing.share.indices
        return _OwnTokens(tokens[:, indices], packing.positions[indices], packing)

    def _own_routing(self, batch: SequenceBatch, own: _OwnTokens) -> Tensor:
        """Return what this rank's routers replay, see `Packing.routing`."""
        assert batch.routing is not None, "the experts of the rollout are not there"
        first = self.decoder.layers[0].layer_number - 1
        routing = batch.routing[:, :, first : first + len(self.decoder.layers)]
        width = sum(own.packing.lengths)
        routing = torch.nn.functional.pad(routing, (0, 0) * 2 + (0, width - routing.shape[1]))
        if own.share is not None:
            routing = routing[:, own.share.indices]
        by_layer = routing.permute(2, 1, 0, 3)  # [layers, seq, batch, top_k]
        if self.config.sequence_parallel:
            by_layer = by_layer.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
        return by_layer.flatten(1, 2)

    def _run_layers(self, own: _OwnTokens) -> Tensor:
        angles = rotation_angles(self.rotary_speeds, own.positions)
        hidden: Tensor = self.decoder(
            hidden_states=self.embed(own.tokens) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=angles[:, None, None, :],
            packed_seq_params=own.packing,
        )
        return hidden

    def _states(self, own: _OwnTokens, indices: Tensor, *, sum_gradients: bool) -> Tensor:
        """Run the last chunk's layers; return the states at some indices, [indices, hidden]."""
        if not self._prunes:
            whole = self._gather_sequence(self._run_layers(own), sum_gradients=sum_gradients)
            return whole.flatten(0, 1).index_select(0, indices)
        # Layers fail on empty inputs.
        wanted = indices if len(indices) else indices.new_zeros(1)
        hidden = self._run_layers(replace(own, packing=replace(own.packing, wanted=wanted)))
        return self._gather_sequence(hidden, sum_gradients=sum_gradients)[: len(indices), 0]

    def row_shape(self, batch: SequenceBatch) -> tuple[int, int]:
        """Return tokens and rows of the activations, over all ranks that share them."""
        rows, columns = batch.tokens.shape
        return round_up(columns, self.token_multiple * self.context_multiple), rows

    def _aligned(self, tokens: Tensor) -> Tensor:
        """Pad [batch, seq] on the right to a length that products and ranks need."""
        multiple = self.token_multiple * self.context_multiple
        missing = round_up(tokens.shape[1], multiple) - tokens.shape[1]
        return torch.nn.functional.pad(tokens, (0, missing)) if missing else tokens

    def head_weight(self) -> Tensor:
        """Return this rank's shard of the language head's weight, [vocab/tp, hidden]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.get_parameter("weight")

    def _gather_sequence(self, hidden: Tensor, *, sum_gradients: bool) -> Tensor:
        """Undo sequence parallelism.

        Args:
            hidden: [seq, batch, hidden] or, with sequence parallelism, [seq/tp, ...].
            sum_gradients: the ranks' gradients are parts of a sum; else they are all equal.
        """
        if self.config.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=sum_gradients, group=self.tp_group
            )
        if sum_gradients:
            return tensor_parallel.copy_to_tensor_model_parallel_region(hidden, self.tp_group)
        return hidden

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Describe this chunk's parameters for distributed checkpoints, or those that learn."""
        if self.has_adapters:
            return self._learning_state_dict(metadata)
        if self.post_process and isinstance(self.output_layer, LatentHead):
            # Megatron's language model expects a head with one weight.
            return super(LanguageModule, self).sharded_state_dict(prefix, sharded_offsets, metadata)
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state

    def _learning_state_dict(self, metadata: Any) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for index, layer in enumerate(self.decoder.layers):
            state |= adapter_state_dict(
                layer,
                prefix=f"decoder.layers.{index}.",
                key=f"decoder.layers.{layer.layer_number - 1}.",
                data_group=metadata["dp_cp_group"],
            )
        if self.post_process and self.head == "scalar":
            head: Any = self.output_layer
            state |= head.sharded_state_dict("output_layer.", (), metadata)
        return state


class ScalarHead(torch.nn.Module):
    """A linear map from a hidden state to one number, replicated on the tensor-parallel ranks.

    A reward model in training may have a second one, the length head, which learns what is to stay
    out of the score. Checkpoints of the training run have it; exports, critics and the reward
    models of ppo do not.
    """

    def __init__(self, config: Any, mesh: Mesh, *, length_head: bool) -> None:
        super().__init__()
        shape, kind = (1, config.hidden_size), config.params_dtype
        self.weight = torch.nn.Parameter(torch.zeros(shape, dtype=kind, device=mesh.device))
        if length_head:
            zeros = torch.zeros(shape, dtype=kind, device=mesh.device)
            self.length_weight = torch.nn.Parameter(zeros)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return float32 [tokens] for [tokens, hidden]."""
        return torch.nn.functional.linear(hidden.float(), self.weight.float())[:, 0]

    def both(self, hidden: Tensor) -> Tensor:
        """Return float32 [tokens, 2], the score and that of the length head."""
        weights = torch.cat((self.weight, self.length_weight)).float()
        return torch.nn.functional.linear(hidden.float(), weights)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Describe the weight as whole on every rank."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets
        )


def _mark_sharded_weights(module: torch.nn.Module) -> None:
    """Mark which weights are shards or experts, since Megatron 0.16 does not always do so.

    A shard without the mark counts as a replica, so that its gradient is left out of the global
    norm. Megatron marks it only where it also initialises it.
    """
    for layer in module.modules():
        if isinstance(layer, tensor_parallel.RowParallelLinear):
            dim = 1
        elif isinstance(
            layer, tensor_parallel.ColumnParallelLinear | tensor_parallel.VocabParallelEmbedding
        ):
            dim = 0
        else:
            continue
        if layer.weight is not None and not hasattr(layer.weight, "tensor_model_parallel"):
            tensor_parallel.set_tensor_model_parallel_attributes(layer.weight, True, dim, 1)
    for name, parameter in module.named_parameters():
        if ".mlp.experts." in name:
            # Experts are not sharded by tensor parallelism, so their gradients are summed over the
            # expert-data group. Megatron does so only if `expert_size` > 1.
            parameter.allreduce = False  # type: ignore[attr-defined]


def build_chunks(
    model: ModelConfig,
    precision: PrecisionConfig,
    mesh: Mesh,
    *,
    head: Head,
    memory: MemoryConfig | None = None,
    frozen: bool = False,
    length_head: bool = False,
    latent_size: int = 0,
    adapters: bool = True,
) -> list[StageModel]:
    """Build this rank's chunks of one model on its device, with parameters not yet filled.

    `memory` matters only to models that are trained. Without `adapters`, those of `model.lora` are
    left to `attach_adapters`, for weights of a model that has none.
    """
    chunks = [
        StageModel(
            model,
            precision,
            mesh,
            head=head,
            chunk=chunk,
            memory=memory or MemoryConfig(),
            length_head=length_head,
            latent_size=latent_size,
        ).to(mesh.device)
        for chunk in range(mesh.num_chunks)
    ]
    if adapters and model.lora.is_on:
        attach_adapters(chunks, mesh)
    return [chunk.requires_grad_(False).eval() for chunk in chunks] if frozen else chunks


def attach_adapters(chunks: list[StageModel], mesh: Mesh) -> None:
    """Give a model its adapters, and let only these and a scalar head learn."""
    for chunk in chunks:
        attach(chunk, mesh)
        freeze_others(chunk)
