"""Logits of the training model itself, on packed rows: the side that exports are measured against.

The chunk, its layers and the isolation of documents are those of training; only the heads are asked for logits instead
of losses. One rank holds everything (tp 1, pp 1), in fp32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data_pipeline.schema import Document
from data_pipeline.stream.assemble import pack
from data_pipeline.stream.collate import collate
from janus_mega.checkpoint.trained import TrainedModel
from janus_mega.config.schema import ParallelConfig, Precision
from janus_mega.infer.model import DocumentLogits
from janus_mega.models.janus import JanusChunk, build_chunk
from janus_mega.models.placement import place_batch
from janus_mega.models.sharding import sharded_parameters
from janus_mega.parallel.groups import ProcessGroups
from janus_mega.parallel.slices import Box, fill_local


class PackedModel:
    """A checkpoint in the training model; call it with documents, it is a `verify.LogitsFunction`."""

    def __init__(self, trained: TrainedModel, groups: ProcessGroups) -> None:
        """Builds the model of a checkpoint on this rank, in a job of tp 1 and pp 1."""
        self.trained = trained
        self.groups = groups
        self.seq_len = trained.config.data.seq_len
        parallel = ParallelConfig(precision=Precision.fp32)
        chunk = build_chunk(trained.model, parallel, trained.config.loss, groups.layout)
        self.chunk: JanusChunk = chunk.to_empty(device=groups.device).eval().requires_grad_(False)

        def read_box(name: str, box: Box) -> Tensor:
            return trained.reader.read_box(name, box)

        for shard in sharded_parameters(self.chunk, groups.layout, trained.model.backbone.num_layers):
            fill_local(shard.name, shard.regions, shard.parameter, read_box)

    @torch.inference_mode()
    def __call__(self, documents: Sequence[Document]) -> list[DocumentLogits]:
        """Both heads at every position of each document; documents lie side by side in as few rows as their order fits.

        Raises:
            ValueError: a document is longer than a row.
        """
        results: list[DocumentLogits] = []
        for row in _rows(documents, self.seq_len):
            hidden = self._hidden(row)
            start = 0
            for document in row:
                part = hidden[start : start + len(document.input_ids)]
                start += len(document.input_ids)
                results.append(DocumentLogits(self.chunk.text_head(part).float(), self.chunk.image_head(part).float()))
        return results

    def _hidden(self, documents: Sequence[Document]) -> Tensor:
        """Hidden states [s, h] of one packed row."""
        packed = pack(
            [replace_labels(document) for document in documents],
            self.seq_len,
            pad_id=self.trained.special_ids.pad,
            understanding_size=self.trained.model.understanding.image_size,
        )
        return self.chunk.hidden_states(place_batch(collate([packed]), self.groups.device))[:, 0]


def replace_labels(document: Document) -> Document:
    """The document without labels; only hidden states are asked for."""
    return replace(document, label_head=document.label_head * 0)


def _rows(documents: Sequence[Document], seq_len: int) -> Iterator[list[Document]]:
    row: list[Document] = []
    used = 0
    for document in documents:
        if row and used + len(document.input_ids) > seq_len:
            yield row
            row, used = [], 0
        row.append(document)
        used += len(document.input_ids)
    if row:
        yield row
