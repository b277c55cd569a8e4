"""One stage chunk of a decoder-only transformer, with a language or a scalar head on the last.

Built from Megatron-Core's embedding, transformer block and vocabulary-parallel layers rather than
from its GPTModel: the head works on the hidden states of response tokens only, never makes the
whole logits, and may be a scalar (critic, reward model) at any pipeline layout.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from marlhf_mega.config.limits import padded_vocab_size
from marlhf_mega.config.model import ModelConfig
from marlhf_mega.config.schema import MemoryConfig, PrecisionConfig
from marlhf_mega.models.batch import SequenceBatch
from marlhf_mega.models.packing import Packing
from marlhf_mega.models.rope import inverse_frequencies, rotation_angles
from marlhf_mega.models.spec import block_spec, transformer_config
from marlhf_mega.models.tail import Tail, can_cut
from marlhf_mega.parallel.context import ContextShare
from marlhf_mega.parallel.mesh import Mesh
from marlhf_mega.parallel.vocab import VocabShard, vocab_parallel_logprobs

Head = Literal["language", "scalar"]


@dataclass(frozen=True)
class _OwnTokens:
    """The tokens of a batch that this rank runs on: all, or its share."""

    tokens: Tensor
    """[batch, seq] int64, or [batch, seq/cp]."""
    positions: Tensor
    """[seq] int64: their places in their sequences."""
    packing: Packing
    """Where the sequences of a row end, and who shares them."""

    @property
    def share(self) -> ContextShare | None:
        """Which tokens these are, if not all."""
        return self.packing.share

    def find(self, batch: SequenceBatch, shift: int) -> tuple[Tensor, Tensor | slice]:
        """Look up the states around real response tokens.

        Returns:
            [chosen] int64, their rows in [seq * batch] states of these tokens; of which real
            tokens they are.
        """
        places, lines = batch.positions + shift, batch.lines
        chosen: Tensor | slice = slice(None)
        if self.share is not None:
            chosen, places = self.share.find(places)
            lines = lines[chosen]
        return places * len(self.tokens) + lines, chosen


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
    ) -> None:
        """Allocate parameters without filling them; `marlhf_mega.checkpoint.weights` does that.

        Args:
            model: the architecture, with its vocabulary size.
            precision: number formats.
            mesh: where this rank stands.
            head: `language` for policy and reference, `scalar` for critic and reward.
            chunk: which of this rank's virtual pipeline stages.
            memory: what is computed again in the backward pass.
        """
        assert model.vocab_size is not None
        config = transformer_config(model, precision, mesh, memory)
        super().__init__(config, mesh.groups)
        self.model, self.head = model, head
        # FP8 products need aligned rows on every rank that shares a sequence.
        self.row_multiple = precision.fp8_alignment
        if config.sequence_parallel:
            self.row_multiple *= mesh.tp_size
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
            self.output_layer = self._build_head(padded, mesh)
        self._cuts_tail = self.post_process and can_cut(config)
        if self._cuts_tail:
            Tail(self.decoder.layers[-1])
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()
        _mark_sharded_weights(self)

    def _build_head(self, padded_vocab: int, mesh: Mesh) -> torch.nn.Module:
        if self.head == "scalar":
            return ScalarHead(self.config, mesh)
        return tensor_parallel.ColumnParallelLinear(
            self.config.hidden_size,
            padded_vocab,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process
            and self.share_embeddings_and_output_weights,
            tp_group=mesh.groups.tp,
        )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the activations of the stage before; the pipeline schedule calls it."""
        single = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(single)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return [seq, batch, hidden] embeddings ([seq/tp, ...] with sequence parallelism).

        Ids beyond the vocabulary stand for its first, at any layout.
        """
        # A policy of a larger vocabulary may sample ids that a reward model does not have.
        known = tokens < self.vocab_shard.num_total
        hidden: Tensor = self.embedding(input_ids=tokens * known, position_ids=None)
        if self.model.embedding_scale:
            # The factor is rounded to the weights' dtype first, as in Gemma's training.
            hidden = hidden * torch.tensor(self.model.hidden_size**0.5, dtype=hidden.dtype)
        return hidden

    def forward(self, batch: SequenceBatch, *, temperature: float = 1.0, shift: int = -1) -> Tensor:
        """Run the chunk; all stages are called with the same batch.

        Args:
            batch: the sequences.
            temperature: divides the logits of a language head.
            shift: scalar head: -1 reads the state before each response token (critic), 0 the
                state after it (reward model).

        Returns:
            Not the last chunk: activations [seq, batch, hidden]. Language head: float32
            [2, batch, response], log-probs of the response tokens and entropies. Scalar head:
            float32 [batch, response].
        """
        own = self._own_tokens(batch)
        if not self.post_process:
            return self._run_layers(own)
        is_language = self.head == "language"
        rows, chosen = own.find(batch, -1 if is_language else shift)
        states = self._states(own, rows, sum_gradients=is_language)
        if is_language:
            outputs = vocab_parallel_logprobs(
                states,
                self.head_weight(),
                batch.response_tokens[chosen],
                shard=self.vocab_shard,
                temperature=temperature,
                softcap=self.model.logits_softcap,
            )
            grid = torch.stack([batch.to_grid(values, chosen) for values in outputs])
        else:
            grid = batch.to_grid(self.output_layer(states), chosen)
        return grid if own.share is None else own.share.sum(grid)

    @torch.no_grad()
    def logits(self, batch: SequenceBatch) -> Tensor:
        """Run the chunk for a look at all logits, as other programs give them; never to train.

        Returns:
            Not the last chunk: activations. Last: float32 [batch, seq, vocab/tp], padding of the
            vocabulary included.
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
        if packing.share is None:
            return _OwnTokens(tokens, packing.positions, packing)
        places = packing.share.places
        return _OwnTokens(tokens[:, places], packing.positions[places], packing)

    def _run_layers(self, own: _OwnTokens) -> Tensor:
        angles = rotation_angles(self.rotary_speeds, own.positions)
        hidden: Tensor = self.decoder(
            hidden_states=self.embed(own.tokens) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=angles[:, None, None, :],
            packed_seq_params=own.packing,
        )
        return hidden

    def _states(self, own: _OwnTokens, rows: Tensor, *, sum_gradients: bool) -> Tensor:
        """Run the layers of the last chunk; return the states in some rows, [rows, hidden]."""
        if not self._cuts_tail:
            whole = self._gather_sequence(self._run_layers(own), sum_gradients=sum_gradients)
            return whole.flatten(0, 1).index_select(0, rows)
        # Layers do not like to see nothing.
        wanted = rows if len(rows) else rows.new_zeros(1)
        hidden = self._run_layers(replace(own, packing=replace(own.packing, wanted=wanted)))
        return self._gather_sequence(hidden, sum_gradients=sum_gradients)[: len(rows), 0]

    def _aligned(self, tokens: Tensor) -> Tensor:
        """Pad [batch, seq] on the right to the rows that the products take; no token sees it."""
        missing = -tokens.shape[1] % (self.row_multiple * self.context_multiple)
        return torch.nn.functional.pad(tokens, (0, missing)) if missing else tokens

    def head_weight(self) -> Tensor:
        """Return the language head's rows on this rank, [vocab/tp, hidden]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.get_parameter("weight")

    def _gather_sequence(self, hidden: Tensor, *, sum_gradients: bool) -> Tensor:
        """Undo sequence parallelism; say whether ranks' gradients are parts of one sum."""
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
        """Describe this chunk's parameters for distributed checkpoints."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state


class ScalarHead(torch.nn.Module):
    """A linear map from a hidden state to one number; every tensor-parallel rank holds it whole."""

    def __init__(self, config: Any, mesh: Mesh) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=mesh.device)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Return float32 [tokens] for [tokens, hidden]."""
        return torch.nn.functional.linear(hidden.float(), self.weight.float())[:, 0]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Describe the weight as whole on every rank."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {}, sharded_offsets
        )


def _mark_sharded_weights(module: torch.nn.Module) -> None:
    """Say which weights are shards or experts: Megatron 0.16 does not always do so.

    Unless marked, a shard counts as a copy, and its gradient is left out of the global norm;
    Megatron marks it only where it also fills it.
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
            # Experts are not cut by tensor parallelism, so their gradients are summed over the
            # expert-data group. Megatron takes them there only if `expert_size` > 1.
            parameter.allreduce = False  # type: ignore[attr-defined]


def build_chunks(
    model: ModelConfig,
    precision: PrecisionConfig,
    mesh: Mesh,
    *,
    head: Head,
    memory: MemoryConfig | None = None,
) -> list[StageModel]:
    """Build this rank's chunks of one model on its device, parameters not yet filled.

    `memory` matters to models that learn only.
    """
    memory = memory or MemoryConfig()
    return [
        StageModel(model, precision, mesh, head=head, chunk=chunk, memory=memory).to(mesh.device)
        for chunk in range(mesh.num_chunks)
    ]
