"""What a page shows of data: packed rows with their documents, samples of a source, and pictures beside their ids.

Values only; `janus_mega.report.data_page` turns them into HTML. Turning image ids back into pictures is injected, so
that nothing here needs torch. Sides of pictures are pixels.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.explain.blame import Layout, UsedDocument, blame_step, rows_of_step
from data_pipeline.explain.originals import Originals
from data_pipeline.explain.readable import ImageSpan, TextSpan, TokenReader
from data_pipeline.manifest import Source
from data_pipeline.plan.open import OpenData
from data_pipeline.plan.order import permutation, stream_key
from data_pipeline.schema import Hole, LabelHead, PackedRow, TokenKind
from data_pipeline.spec import ImageGeometry
from data_pipeline.stream.dataset import RowDataset
from data_pipeline.stream.read import SampleReader
from data_pipeline.text.interface import TextTokenizer

_TEXT_ONLY_IDS = 48
"""Ids shown of a text whose tokenizer is not given."""


class PictureDecoder(Protocol):
    """Turns image ids back into pictures."""

    digest: str
    """sha256 of the image tokenizer, hex."""

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Ids [n, num_tokens] to pictures uint8 [n, 3, side, side]."""
        ...


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture, or the place of one that cannot be shown."""

    label: str
    """Where it comes from: seen, decoded ids, original."""
    pixels: np.ndarray | None = None
    """uint8 [3, height, width]."""


Part = TextSpan | Picture


@dataclass(frozen=True, slots=True)
class DocumentView:
    """One document of a row."""

    used: UsedDocument
    start: int
    """First of its positions in the row."""
    stop: int
    parts: tuple[Part, ...]
    """Its content in order."""
    hole: str = ""
    """Why it is a hole; nothing where it is whole."""


@dataclass(frozen=True, slots=True)
class RowView:
    """One packed row."""

    row: int
    dp_rank: int
    micro_batch: int
    seq_len: int
    kinds: tuple[tuple[TokenKind, int, int], ...]
    """(kind, start, stop) of runs of positions, padding included."""
    trained: tuple[tuple[int, int], ...]
    """(start, stop) of runs of positions that bear a loss."""
    documents: tuple[DocumentView, ...]

    @property
    def num_padding(self) -> int:
        """Positions after the last document."""
        return self.seq_len - (self.documents[-1].stop if self.documents else 0)


@dataclass(frozen=True, slots=True)
class SampleView:
    """One stored sample of a source."""

    uid: str
    sample: int
    place: str
    """Shard and byte."""
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Viewer:
    """What it takes to make ids readable."""

    tokenizer: TextTokenizer | None = None
    decoder: PictureDecoder | None = None
    originals: Originals | None = None


def view_rows(
    data: OpenData, step: int, viewer: Viewer, layout: Layout | None = None, rows: Sequence[int] = ()
) -> list[RowView]:
    """Rows of a step as they will be trained.

    Args:
        data: Plan and sources.
        step: From 1.
        viewer: Decodes; its text tokenizer is not used, the run's is.
        layout: Ranks that rows are dealt to.
        rows: Which rows of the plan; none takes all of the step.

    Raises:
        UserError: There is no such step or row, or a shard cannot be read.
    """
    within = rows_of_step(data.plan, step)
    strangers = [row for row in rows if row not in within]
    if strangers:
        raise UserError(f"row {strangers[0]} is not in step {step}, whose rows are {within.start} to {within.stop - 1}")
    documents = blame_step(data, step, layout)
    dataset, reader = RowDataset(data), TokenReader(data.builder.tokenizer)
    return [
        _view_row(dataset, reader, viewer, row, [document for document in documents if document.row == row])
        for row in (rows or within)
    ]


def _view_row(
    dataset: RowDataset, reader: TokenReader, viewer: Viewer, row_no: int, used: Sequence[UsedDocument]
) -> RowView:
    row = dataset[row_no]
    holes = {(hole.source, hole.uid, hole.offset): hole for hole in row.holes}
    decoded = _decode_row(row, viewer.decoder)
    documents, start, num_seen = [], 0, 0
    for document in used:
        stop = start + document.tokens
        hole = holes.get((document.source, document.uid, document.offset))
        parts: tuple[Part, ...] = ()
        if not hole:
            parts, num_seen = _parts(row, (start, stop), reader, decoded, num_seen)
            parts = _with_original(parts, document, viewer)
        documents.append(DocumentView(document, start, stop, parts, _hole_text(hole)))
        start = stop
    return RowView(
        row=row_no,
        dp_rank=used[0].dp_rank if used else 0,
        micro_batch=used[0].micro_batch if used else 0,
        seq_len=len(row.input_ids),
        kinds=tuple((TokenKind(value), begin, end) for value, begin, end in _runs(row.token_kind)),
        trained=tuple((begin, end) for value, begin, end in _runs(row.label_head != LabelHead.none) if value),
        documents=tuple(documents),
    )


def _hole_text(hole: Hole | None) -> str:
    return f"{hole.reason}: {hole.message}" if hole else ""


def _runs(values: np.ndarray) -> list[tuple[int, int, int]]:
    """(value, start, stop) of runs of equal values."""
    borders = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return [(int(values[start]), start, stop) for start, stop in itertools.pairwise(borders)]


def _decode_row(row: PackedRow, decoder: PictureDecoder | None) -> dict[int, np.ndarray]:
    """Drawn pictures by the position that their ids begin at."""
    drawn = [(start, stop) for kind, start, stop in _runs(row.token_kind) if kind == TokenKind.image_gen]
    if not drawn or decoder is None:
        return {}
    pictures = decoder.decode(np.stack([row.input_ids[start:stop] for start, stop in drawn]))
    return {start: picture for (start, _), picture in zip(drawn, pictures, strict=True)}


def _parts(
    row: PackedRow, place: tuple[int, int], reader: TokenReader, decoded: Mapping[int, np.ndarray], num_seen: int
) -> tuple[tuple[Part, ...], int]:
    """Content of the document at a place of a row, and the images understood up to its end."""
    here = slice(*place)
    parts: list[Part] = []
    for span in reader.spans(row.input_ids[here], row.token_kind[here], row.label_head[here]):
        if isinstance(span, TextSpan):
            parts.append(span)
        elif span.kind is TokenKind.image_und:
            parts.append(Picture("seen by the encoder", row.pixel_values[num_seen]))
            num_seen += 1
        else:
            parts.append(_drawn(span, decoded.get(place[0] + span.start)))
    return tuple(parts), num_seen


def _drawn(span: ImageSpan, picture: np.ndarray | None) -> Picture:
    if picture is None:
        return Picture(f"{span.stop - span.start} image ids")
    return Picture("decoded ids", picture)


def _with_original(parts: tuple[Part, ...], document: UsedDocument, viewer: Viewer) -> tuple[Part, ...]:
    """Puts the original beside a drawn picture, where one is known under the same uid."""
    if not document.images_drawn or viewer.originals is None:
        return parts
    original = viewer.originals.find(document.uid)
    return parts if original is None else (*parts, Picture("original", original))


def view_samples(source: Source, viewer: Viewer, count: int, seed: int = 0) -> list[SampleView]:
    """Some samples of a source, at random but always the same; broken ones say so.

    Raises:
        UserError: A shard cannot be read, or ids are of another tokenizer than those given.
    """
    _check_tokenizers(source, viewer)
    if source.manifest.layout == "pairs" and viewer.tokenizer is None:
        raise UserError(
            f"{source.path}: captions of foreign tars are tokenized when they are read; give its --text-tokenizer"
        )
    chosen = np.sort(permutation(stream_key("preview", seed), len(source))[:count]).tolist()
    geometry = ImageGeometry(understanding_size=_preview_side(source))
    reader = SampleReader(source, geometry, viewer.tokenizer)
    views = []
    for number in chosen:
        shard, _ = source.place_of(number)
        place = f"{source.manifest.shards[shard].name}:{int(source.offset[number])}"
        try:
            parts = _sample_parts(source, reader, viewer, number)
        except UserError as error:
            parts = (TextSpan(str(error), is_special=True),)
        views.append(SampleView(source.uid(number), number, place, parts))
    return views


def _preview_side(source: Source) -> int:
    return 192 if source.kind == "interleaved" else 16


def _check_tokenizers(source: Source, viewer: Viewer) -> None:
    entry = source.manifest.image_tokenizer
    if viewer.decoder is not None and entry is not None and entry.digest != viewer.decoder.digest:
        raise UserError(
            f"{source.path}: its image ids come from image tokenizer sha256 {entry.digest}, the one given is sha256 "
            f"{viewer.decoder.digest}; give the tokenizer that prepare used"
        )
    if viewer.tokenizer is not None and source.manifest.text_tokenizer != viewer.tokenizer.digest:
        raise UserError(
            f"{source.path}: its text ids come from text tokenizer sha256 {source.manifest.text_tokenizer}, the one "
            f"given is sha256 {viewer.tokenizer.digest}; give the tokenizer that prepare used"
        )


def _sample_parts(source: Source, reader: SampleReader, viewer: Viewer, number: int) -> tuple[Part, ...]:
    sample = reader.read(number)
    parts: list[Part] = []
    if sample.image_ids is not None:
        original = viewer.originals.find(sample.uid) if viewer.originals else None
        parts += [Picture("original", original)] if original is not None else []
        decoded = viewer.decoder.decode(sample.image_ids[None])[0] if viewer.decoder else None
        parts.append(Picture("decoded ids" if viewer.decoder else f"{len(sample.image_ids)} image ids", decoded))
        if sample.caption_ids is not None:
            parts.append(_text(sample.caption_ids, viewer))
    for segment in sample.segments:
        if segment.text_ids is None:
            parts.append(Picture("stored picture", sample.images[segment.image]))
        else:
            parts.append(_text(segment.text_ids, viewer, segment.has_loss))
    return tuple(parts)


def _text(ids: np.ndarray, viewer: Viewer, has_loss: bool = False) -> TextSpan:
    if viewer.tokenizer is not None:
        return TextSpan(viewer.tokenizer.decode(ids.tolist()), has_loss)
    shown = " ".join(map(str, ids[:_TEXT_ONLY_IDS].tolist()))
    return TextSpan(f"ids {shown}{' ...' if len(ids) > _TEXT_ONLY_IDS else ''}", has_loss)
