"""Rows that a layout is checked with: the hard cases of a Janus, the same global batch of a step for any layout.

Synthetic rows need no shards: documents of every kind are made from the configuration's own geometry, seeded by step
and row. Steps go round: every modality everywhere; no image to understand in the second half of the rows, so that a
data-parallel rank or a late micro-batch has none; text only; drawn images in the first half only; understood images
only, beside rows that are all padding. Real rows are the run's own, some of them replaced by rows without anything to
understand.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from data_pipeline.plan.open import open_data
from data_pipeline.schema import LabelHead, TaskId, TokenKind
from data_pipeline.spec import DataSpec, ImageGeometry, Task
from data_pipeline.stream.collate import collate
from data_pipeline.stream.dataset import RowDataset
from data_pipeline.text.load import load_text_tokenizer
from janus_mega.config.load import dump
from janus_mega.config.schema import RunConfig
from janus_mega.train.janus import JanusWorkload

_STEPS = (
    (("ugt", "giu", "itg", "tug"), ("ugt", "giu", "itg", "tug")),
    (("ugt", "giu", "itg", "tug"), ("gt", "tg", "tgt", "gg")),
    (("tt", "ttt", "t", "tttt"), ("tt", "ttt", "t", "tttt")),
    (("gg", "gtg", "g", "ggg"), ("tt", "ttt", "t", "tttt")),
    (("u", "", "uu", "i"), ("u", "uu", "", "uu")),
)
"""Document kinds of the rows in the first and in the second half of a step: t text, u an image and what is said of it,
i text between two images, g a drawn image."""


class SyntheticWorkload(JanusWorkload):
    """A Janus on synthetic rows; opens no tokenizer and no shard."""

    def __init__(self, config: RunConfig) -> None:  # the parent's opens data
        self.config = config
        self.task_weights = config.loss.task_weights
        self.seq_len = config.data.seq_len
        self.config_text = dump(config)

    def batches(self, dp_rank: int, dp_size: int, first_step: int, last_step: int) -> Iterator[list[dict[str, Tensor]]]:
        """This dp rank's micro-batches."""
        for step in range(first_step, last_step):
            rows = [self._row(step, number) for number in _share_of(self.config, dp_rank, dp_size)]
            size = self.config.parallel.micro_batch_size
            yield [_join(rows[at : at + size]) for at in range(0, len(rows), size)]

    def _row(self, step: int, number: int) -> dict[str, Tensor]:
        halves = _STEPS[step % len(_STEPS)]
        kinds = halves[2 * number // _num_rows(self.config)]
        generator = torch.Generator().manual_seed((self.config.seed * 1009 + step) * 100_003 + number)
        return synthetic_row(kinds[number % len(kinds)], self.config, generator)


class RealRowsWorkload(JanusWorkload):
    """The stage's rows, with some replaced by rows that hold no image to understand."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._rows = RowDataset(self.data)
        tokenizer = load_text_tokenizer(config.data.text_tokenizer)
        blind = open_data(_without_understanding(config.data), tokenizer, global_batch_size=_num_rows(config))
        self._blind_rows = RowDataset(blind)

    def batches(self, dp_rank: int, dp_size: int, first_step: int, last_step: int) -> Iterator[list[dict[str, Tensor]]]:
        """Odd steps: nothing to understand in the second half; the last step: nowhere."""
        num_rows = _num_rows(self.config)
        for step in range(first_step, last_step):
            first_blind = 0 if step == last_step - 1 else num_rows // 2 if step % 2 else num_rows
            rows = [
                (self._rows if offset < first_blind else self._blind_rows)[step * num_rows + offset]
                for offset in _share_of(self.config, dp_rank, dp_size)
            ]
            size = self.config.parallel.micro_batch_size
            yield [collate(rows[at : at + size]) for at in range(0, len(rows), size)]


def synthetic_row(kinds: str, config: RunConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """A row of documents, as many as fit, the rest padding: keys of schema.BATCH_KEYS, without the row dimension."""
    seq_len, geometry = config.data.seq_len, config.data.geometry
    row = {name: torch.zeros(seq_len, dtype=torch.int32) for name in ("input_ids", "position_ids", "labels")}
    row["token_kind"] = torch.full((seq_len,), int(TokenKind.pad), dtype=torch.uint8)
    row |= {name: torch.zeros(seq_len, dtype=torch.uint8) for name in ("label_head", "label_task")}
    borders, num_images = [0], 0
    for kind in kinds:
        layout = _document_layout(kind, geometry, generator)
        start, stop = borders[-1], borders[-1] + sum(length for _, length in layout)
        if stop > seq_len:
            break
        _fill({name: values[start:stop] for name, values in row.items()}, kind, layout, config, generator)
        num_images += sum(token_kind == TokenKind.image_und for token_kind, _ in layout)
        borders.append(stop)
    if borders[-1] < seq_len:
        row["position_ids"][borders[-1] :] = torch.arange(seq_len - borders[-1])
        borders.append(seq_len)
    side = geometry.understanding_size
    row["cu_seqlens"] = torch.tensor(borders, dtype=torch.int32)
    row["pixel_values"] = torch.randint(0, 256, (num_images, 3, side, side), generator=generator, dtype=torch.uint8)
    return row


def _document_layout(kind: str, geometry: ImageGeometry, generator: torch.Generator) -> list[tuple[TokenKind, int]]:
    """Runs of tokens of one kind, with texts of random lengths around images."""

    def text() -> tuple[TokenKind, int]:
        return TokenKind.text, int(torch.randint(3, 12, (1,), generator=generator))

    understood = (TokenKind.image_und, geometry.understanding_tokens)
    drawn = (TokenKind.image_gen, geometry.generation_tokens)
    runs = {"t": [text(), text()], "u": [text(), understood, text()], "g": [text(), drawn, text()]}
    return runs[kind] if kind != "i" else [text(), understood, text(), understood, text()]


def _fill(
    document: dict[str, Tensor],
    kind: str,
    layout: list[tuple[TokenKind, int]],
    config: RunConfig,
    generator: torch.Generator,
) -> None:
    """Random ids; every token that may be predicted is, text after text and drawn image after its mark."""
    kinds = torch.cat([torch.full((length,), int(token_kind), dtype=torch.uint8) for token_kind, length in layout])
    text = torch.randint(0, config.model.backbone.vocab_size, kinds.shape, generator=generator)
    codes = torch.randint(0, config.data.geometry.codebook_size, kinds.shape, generator=generator)
    is_drawn = kinds == TokenKind.image_gen
    ids = torch.where(is_drawn, codes, text).int()
    document["token_kind"][:] = kinds
    document["input_ids"][:] = ids
    document["position_ids"][:] = torch.arange(len(ids))
    scored = is_drawn if kind == "g" else kinds == TokenKind.text
    positions = torch.nonzero(scored[1:]).squeeze(1)
    task = {"t": TaskId.text, "g": TaskId.generation}.get(kind, TaskId.understanding)
    document["labels"][positions] = ids[positions + 1]
    document["label_head"][positions] = int(LabelHead.image if kind == "g" else LabelHead.text)
    document["label_task"][positions] = int(task)


def _join(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as one micro-batch."""
    seq_len = len(rows[0]["input_ids"])
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name not in _RAGGED}
    borders = [row["cu_seqlens"][1:] + number * seq_len for number, row in enumerate(rows)]
    batch["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.int32), *borders])
    batch["pixel_values"] = torch.cat([row["pixel_values"] for row in rows])
    return batch


_RAGGED = ("cu_seqlens", "pixel_values")


def _share_of(config: RunConfig, dp_rank: int, dp_size: int) -> range:
    """Numbers of the rows, within a step, of a dp rank."""
    share = _num_rows(config) // dp_size
    return range(dp_rank * share, (dp_rank + 1) * share)


def _num_rows(config: RunConfig) -> int:
    return config.stage.global_batch_size


def _without_understanding(spec: DataSpec) -> DataSpec:
    sources = {
        name: replace(source, weight=0.0) if source.task == Task.understanding else source
        for name, source in spec.sources.items()
    }
    return replace(spec, sources=sources)
