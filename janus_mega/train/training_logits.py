"""Logits of the training network itself: packed rows, megatron layers, the very modules that were trained.

What exports and key-value-cached inference are compared with. Documents share rows as in training, so a mistake in
their isolation shows. One rank, fp32, no engine.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from data_pipeline.schema import Document
from data_pipeline.stream.assemble import pack
from data_pipeline.stream.collate import collate
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.checkpoint.trained import TrainedModel
from janus_mega.config.schema import ParallelConfig, Precision
from janus_mega.engine.state import load_weights
from janus_mega.infer.model import DocumentLogits
from janus_mega.models.janus import build_chunks
from janus_mega.models.placement import place_batch
from janus_mega.models.sharding import sharded_parameters
from janus_mega.parallel.groups import ProcessGroups


class TrainingLogits:
    """Teacher-forced logits of documents through the training network; call it with documents."""

    def __init__(self, trained: TrainedModel, groups: ProcessGroups) -> None:
        """Builds the whole network on this rank.

        Raises:
            ValueError: the groups are not those of a single rank.
        """
        if groups.layout.world_size != 1:
            raise ValueError(f"training logits are computed by one rank, this job has {groups.layout.world_size}")
        model = trained.model
        parallel = ParallelConfig(precision=Precision.fp32)
        (built,) = build_chunks(model, parallel, trained.config.loss, groups.layout)
        chunk = built.to_empty(device=groups.device)
        shards = list(sharded_parameters([chunk], groups.layout))
        load_weights(shards, open_checkpoint(Path(trained.reader.directory)).read_box)
        self._chunk = chunk.eval()
        self._device = groups.device
        self._seq_len = trained.config.data.seq_len
        self._pad_id = trained.special_ids.pad
        self._image_size = model.understanding.image_size

    @torch.inference_mode()
    def __call__(self, documents: Sequence[Document]) -> list[DocumentLogits]:
        """Both heads at every position of every document, fp32; documents are packed in order.

        Raises:
            ValueError: a document is longer than a row.
        """
        results: list[DocumentLogits] = []
        row: list[Document] = []
        for document in documents:
            if row and sum(len(other.input_ids) for other in [*row, document]) > self._seq_len:
                results += self._score(row)
                row = []
            row.append(document)
        return results + (self._score(row) if row else [])

    def _score(self, row: Sequence[Document]) -> list[DocumentLogits]:
        packed = pack(row, self._seq_len, pad_id=self._pad_id, understanding_size=self._image_size)
        batch = place_batch(collate([packed]), self._device)
        hidden = self._chunk.hidden_states(batch).squeeze(1)  # [s, h]
        text, image = (head(hidden).float() for head in (self._chunk.text_head, self._chunk.image_head))
        spans = list(pairwise(packed.cu_seqlens.tolist()))[: len(row)]  # padding is a segment of its own
        return [DocumentLogits(text[start:stop], image[start:stop]) for start, stop in spans]
