"""Janus: one piece of the pipeline, from placed batch to hidden states or loss sums.

The first chunk holds both visual pathways and the text embedding, the last one both heads; each has its share of the
decoder's layers. Attribute names are the global parameter names of checkpoints.

Which modules a micro-batch calls, and on what where it lacks a pathway or a task, is told by the tables of `pathways`.

Shapes: `s` seq_len, `b` rows, `h` hidden_size.
"""

from collections.abc import Callable, Collection

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from data_pipeline.schema import TaskId
from janus_mega.config import derive
from janus_mega.config.schema import LossConfig, ModelConfig, Module, ParallelConfig
from janus_mega.models.adaptors import Adaptor
from janus_mega.models.backbone import build_decoder, rotary_angles, transformer_config
from janus_mega.models.dealt import dealt_over_tp
from janus_mega.models.heads import ImageHead, VocabParallelHead
from janus_mega.models.pathways import HEADS, WAYS_IN, WayIn, place_in, walk_in
from janus_mega.models.placement import PlacedBatch
from janus_mega.models.vision.registry import build_encoder
from janus_mega.parallel.layout import ChunkPlace, Layout, chunk_places

MODULE_ATTRIBUTES = {module: "decoder" if module == Module.backbone else module.value for module in Module}
"""Attribute of a JanusChunk that holds each module."""


class JanusChunk(nn.Module):
    """The modules of one piece of the pipeline; `model_type`, `config`, `set_input_tensor` are for schedules."""

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, place: ChunkPlace, chunk_no: int, loss: LossConfig
    ) -> None:
        super().__init__()
        self.config = config
        self.model = model
        self.place = place
        hidden_size, codes = config.hidden_size, model.image_tokenizer
        if place.is_first:
            self.text_embedding = VocabParallelEmbedding(
                model.backbone.vocab_size, hidden_size, init_method=nn.init.zeros_, config=config
            )
            self.understanding_encoder = build_encoder(model.understanding)
            self.understanding_adaptor = Adaptor(self.understanding_encoder.hidden_size, hidden_size)
            self.generation_embedding = nn.Embedding(codes.codebook_size, codes.code_dim)
            self.generation_adaptor = Adaptor(codes.code_dim, hidden_size)
        self.decoder = build_decoder(config, place, chunk_no)
        if place.is_last:
            self.text_head = VocabParallelHead(config, model.backbone.vocab_size, loss)
            inner_size = model.image_head_hidden_size or hidden_size
            self.image_head = ImageHead(config, inner_size, codes.codebook_size, loss)
        self._trainable: frozenset[Module] = frozenset(Module)
        self.layout: Layout | None = None
        """Where this rank is, if its tp ranks share out the images of the understanding encoder."""

    def train_only(self, modules: Collection[Module]) -> None:
        """Freezes everything but `modules`; frozen modules get no gradient and, where possible, no graph."""
        self._trainable = frozenset(modules)
        for module, attribute in MODULE_ATTRIBUTES.items():
            if hasattr(self, attribute):
                getattr(self, attribute).requires_grad_(module in self._trainable)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Receives the previous chunk's output [s/tp, b, h] (None on the first)."""
        self.decoder.set_input_tensor(input_tensor[0])

    def forward(self, batch: PlacedBatch) -> Tensor:
        """Hidden states [s/tp, b, h], or from the last chunk fp32 [tasks], the sums of cross entropies.

        Collective over: tp.
        """
        hidden = self.hidden_states(batch)
        return torch.stack(self.task_losses(hidden, batch)) if self.place.is_last else hidden

    def hidden_states(self, batch: PlacedBatch) -> Tensor:
        """Embeds (first chunk) and transforms: [s/tp, b, h]. Collective over: tp."""
        stream = self._embed(batch) if self.place.is_first else None
        head_dim = self.config.kv_channels
        return self.decoder(
            hidden_states=stream,
            attention_mask=None,
            rotary_pos_emb=rotary_angles(batch.position_ids, head_dim, self.model.backbone.rope_theta),
            packed_seq_params=batch.documents,
        )

    def _embed(self, batch: PlacedBatch) -> Tensor:
        stream = self.text_embedding(batch.text_ids)  # [s, b, h]
        shape = stream.shape
        stream = stream.flatten(0, 1)
        for way in WAYS_IN:
            stream = place_in(stream, way.index(batch), self._walk_in(way, batch))
        stream = stream.view(shape)
        return scatter_to_sequence_parallel_region(stream) if self.config.sequence_parallel else stream

    def _walk_in(self, way: WayIn, batch: PlacedBatch) -> Tensor | None:
        return walk_in(way, self, batch, self.model, self._trainable)

    def call(self, module: Module, values: Tensor) -> Tensor:
        """A module's work on items [n, ...]. Collective over: tp, for the encoder where its images are dealt."""
        return self.dealt(module, self.get_submodule(module.value), values)

    def dealt(self, module: Module, work: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """`work(values)`, dealt over tp if that is how this module works."""
        if self.layout is None or module is not Module.understanding_encoder:
            return work(values)
        return dealt_over_tp(work, values, self.layout.tp_size, self.layout.tp_rank)

    def task_losses(self, hidden: Tensor, batch: PlacedBatch) -> list[Tensor]:
        """fp32 [] each: sums of cross entropies (and z-losses) per task, from the last chunk's hidden states.

        Collective over: tp.
        """
        if self.config.sequence_parallel:
            # Every rank goes on with all positions, so the backward of the gather is a plain cut.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        flat = hidden.flatten(0, 1)  # [s * b, h]
        sums = []
        for task, index, labels in zip(TaskId, batch.label_index, batch.labels, strict=True):
            head = self.get_submodule(HEADS[task].value)
            if index.shape[0]:
                sums.append(head(flat.index_select(0, index), labels))
            else:
                sums.append(head(flat[:1], labels.new_zeros(1)) * 0.0)
        return sums


def build_chunks(model: ModelConfig, parallel: ParallelConfig, loss: LossConfig, layout: Layout) -> list[JanusChunk]:
    """This rank's chunks (several if interleaved) on the meta device, parameters in the precision of `parallel`."""
    layer_counts = derive.layer_counts(model, parallel)
    config = transformer_config(model.backbone, parallel, layer_counts)
    places = chunk_places(layer_counts, layout.pp_size, layout.pp_rank)
    with torch.device("meta"):
        chunks = [
            JanusChunk(model, config, place, number, loss).to(config.params_dtype)
            for number, place in enumerate(places)
        ]
    if parallel.split_encoder:
        chunks[0].layout = layout
    return chunks
