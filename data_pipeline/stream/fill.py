"""Text and drawings into a canvas: their bytes go from the tar to their place in one read and are checked there.

Which kind a position has and which head scores it depends on the source and the length of the document alone: a pattern
made once. Special tokens, places and choices are found for all documents of a source at once; what remains for each is
reading and its checksum.
"""

import os
import zlib
from abc import ABC, abstractmethod

import numpy as np

from data_pipeline.dialogue import DialogueBuilder
from data_pipeline.schema import LabelHead, TaskId, TokenKind
from data_pipeline.stream.canvas import HEAD, KIND, Canvas, Pattern, plain_pattern
from data_pipeline.stream.choices import Choices
from data_pipeline.stream.shard_files import ShardFiles


class Filler(ABC):
    """Fills the documents of one source."""

    def __init__(self, files: ShardFiles, builder: DialogueBuilder) -> None:
        self._files = files
        self._source = files.source
        self._ids = builder.ids
        self._token_bytes = np.dtype(files.source.manifest.token_dtype).itemsize

    def fill(self, canvas: Canvas, chosen: np.ndarray) -> list[int]:
        """Fills documents of this source.

        Args:
            canvas: Where to; its ids take as many bytes as the source's text ids.
            chosen: int64 [d], their numbers in the canvas.

        Returns:
            Numbers of those whose bytes cannot be read or do not match the index; the plain way says what it is.

        Raises:
            UserError: A shard is missing.
        """
        try:
            return self._fill(canvas, chosen)
        except (OSError, OverflowError):  # a disk that fails, an index that points nowhere
            return chosen.tolist()

    @abstractmethod
    def _fill(self, canvas: Canvas, chosen: np.ndarray) -> list[int]:
        """As `fill`, but a read may fail."""

    def _open(self, samples: np.ndarray) -> list[int]:
        """Descriptors of the shards that hold some samples."""
        shards = np.searchsorted(self._source.first_samples, samples, side="right") - 1
        return self._files.descriptors(shards.tolist())


class TextFiller(Filler):
    """Texts: bos, ids, eos, or a piece of that."""

    def __init__(self, files: ShardFiles, builder: DialogueBuilder, task: TaskId, seq_len: int) -> None:
        super().__init__(files, builder)
        pattern = plain_pattern(seq_len, task=task)
        pattern[HEAD, :-1] = LabelHead.text
        self._pattern = Pattern(pattern)

    def _fill(self, canvas: Canvas, chosen: np.ndarray) -> list[int]:
        source, planned, width = self._source, canvas.planned, self._token_bytes
        samples, start = planned.sample_no[chosen], planned.start[chosen]
        begin, end = canvas.begin[chosen], canvas.end[chosen]
        size = source.length[samples].astype(np.int64)
        has_bos = start == 0
        has_eos = start + (end - begin) == size // width + 2
        canvas.tokens[begin[has_bos]] = self._ids.bos
        canvas.tokens[end[has_eos] - 1] = self._ids.eos
        at, to = (begin + has_bos) * width, (end - has_eos) * width
        stored = (self._open(samples), source.offset[samples].tolist(), size.tolist(), source.crc[samples].tolist())
        skipped = (np.maximum(start - 1, 0) * width).tolist()
        place, preadv, crc32 = canvas.token_bytes, os.preadv, zlib.crc32
        unsure = []
        numbers = chosen.tolist()
        for number, file, offset, num_bytes, crc, skip, first, last in zip(
            numbers, *stored, skipped, at.tolist(), to.tolist(), strict=True
        ):
            view = place[first:last]
            if len(view) == num_bytes:
                if preadv(file, (view,), offset) != num_bytes or crc32(view) != crc:
                    unsure.append(number)
                continue
            content = os.pread(file, num_bytes, offset)  # a piece: the checksum is of the whole text
            if len(content) != num_bytes or crc32(content) != crc:
                unsure.append(number)
            else:
                view[:] = content[skip : skip + len(view)]
        for number in numbers:
            canvas.patterns[number] = self._pattern
        return unsure


class DrawingFiller(Filler):
    """Drawings: bos, prompt, begin-of-image, image ids, end-of-image."""

    def __init__(
        self, files: ShardFiles, builder: DialogueBuilder, choices: Choices, task: TaskId, seq_len: int
    ) -> None:
        super().__init__(files, builder)
        images = self._source.manifest.image_tokenizer
        assert images is not None
        self._choices = choices
        self._before, self._after = builder.around_caption
        self._num_ids, self._num_variants = images.num_tokens, images.num_variants
        pattern = plain_pattern(seq_len, task=task)
        pattern[KIND, -1 - self._num_ids : -1] = TokenKind.image_gen
        pattern[HEAD, -2 - self._num_ids : -2] = LabelHead.image
        self._pattern = Pattern(pattern)

    def _fill(self, canvas: Canvas, chosen: np.ndarray) -> list[int]:
        source, planned, width, tokens = self._source, canvas.planned, self._token_bytes, canvas.tokens
        assert source.image_offset is not None
        samples, epochs = planned.sample_no[chosen], planned.epoch[chosen]
        begin, end = canvas.begin[chosen], canvas.end[chosen]
        caption, image = begin + len(self._before), end - 1 - self._num_ids
        after = image - len(self._after)
        tokens[_spans(begin, len(self._before))] = self._before
        tokens[_spans(after, len(self._after))] = self._after
        tokens[end - 1] = self._ids.end_of_image
        # Image ids go straight to their place unless they are narrower than it or one of several crops.
        crop_bytes = 2 * self._num_ids
        row_bytes = crop_bytes * self._num_variants
        crops = None
        image_place, image_at = canvas.token_bytes, image * width
        if width != 2 or self._num_variants > 1:
            crops = np.empty((len(chosen), self._num_variants, self._num_ids), "<u2")
            image_place, image_at = crops.data.cast("B"), np.arange(len(chosen)) * row_bytes
        place, preadv, crc32 = canvas.token_bytes, os.preadv, zlib.crc32
        unsure = []
        numbers = chosen.tolist()
        stored = (source.image_offset[samples], source.offset[samples], source.crc[samples])
        places = (image_at, caption * width, after * width)
        for number, file, image_offset, offset, crc, to_image, first, last in zip(
            numbers, self._open(samples), *(column.tolist() for column in (*stored, *places)), strict=True
        ):
            view, text = image_place[to_image : to_image + row_bytes], place[first:last]
            found = preadv(file, (view,), image_offset) + preadv(file, (text,), offset)
            if found != row_bytes + last - first or crc32(text, crc32(view)) != crc:
                unsure.append(number)
        if crops is not None:
            variants = self._choices.variant(source, samples, epochs).tolist()
            for crop, variant, first in zip(crops, variants, image.tolist(), strict=True):
                tokens[first : first + self._num_ids] = crop[variant]
        drops = np.flatnonzero(self._choices.drops_prompt(source, samples, epochs))
        for first, last in zip((begin[drops] + 1).tolist(), (image[drops] - 1).tolist(), strict=True):
            tokens[first:last] = self._ids.pad
        for number in numbers:
            canvas.patterns[number] = self._pattern
        return unsure


def _spans(begin: np.ndarray, length: int) -> np.ndarray:
    """int64 [d, length]: positions from each begin on."""
    return begin[:, None] + np.arange(length)
