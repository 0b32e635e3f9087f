"""Text documents to block records of ids: `{"text": ...}` lines and plain text files."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.prepare.directory import Facts
from data_pipeline.prepare.meta import Meta, sample_meta
from data_pipeline.prepare.options import PrepareOptions, PrepareReport, Progress
from data_pipeline.prepare.records import RawRecord, text_field
from data_pipeline.prepare.run import run_prepare
from data_pipeline.prepare.shard import FlatIds, ShardWriter, token_dtype
from data_pipeline.prepare.task import Preparer
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.uid import uid_text

MAX_RECORD_TOKENS = 2_000_000
"""A block record ends once it holds so many ids, 4 MB of two-byte ones."""
_BORDERS = (re.compile(r"(?<=\n\n)"), re.compile(r"(?<=\n)"))
"""After a paragraph, after a line."""


def prepare_text(
    inputs: Iterable[str | Path],
    out: str | Path,
    tokenizer: TextTokenizer,
    *,
    options: PrepareOptions | None = None,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes shards of kind text; continues where an earlier call was stopped.

    Every text is one document, however long (the plan cuts what exceeds a row), unless options.max_document_tokens
    says otherwise. Empty texts are counted and left out.

    Raises:
        UserError: Bad input, or a directory that holds something else.
    """
    options = options or PrepareOptions()
    return run_prepare(_TextPreparer(tokenizer, options), inputs, Path(out), options, progress)


class _TextPreparer(Preparer):
    """Collects documents and writes a record whenever one is full."""

    def __init__(self, tokenizer: TextTokenizer, options: PrepareOptions) -> None:
        self._tokenizer = tokenizer
        self._record_size = options.record_size
        self._max_tokens = options.max_document_tokens
        self._keep = options.importing.keep_columns
        self.facts = Facts(
            kind="text",
            text_tokenizer=tokenizer.digest,
            token_dtype=token_dtype(tokenizer),
            record_size=options.record_size,
        )
        self.abandon()

    def settings(self) -> dict[str, Any]:
        """What the bytes depend on."""
        return {
            "text_tokenizer": self._tokenizer.digest,
            "record_size": self._record_size,
            "max_document_tokens": self._max_tokens,
        }

    def add(self, record: RawRecord, writer: ShardWriter) -> None:
        """Adds one document, or the pieces of a long one."""
        fields = record.fields()
        text, identity = text_field(fields, "text"), record.identity(fields)
        if not text:
            writer.rejects["empty_text"] += 1
            return
        meta = sample_meta(fields, self._keep)
        for number, ids in enumerate(cut_text(text, self._tokenizer, self._max_tokens)):
            self._documents.append(ids)
            self._uids.append(uid_text(f"{identity}#{number}" if number else identity))
            self._metas.append(meta)
            self._num_tokens += len(ids)
            if len(self._documents) == self._record_size or self._num_tokens >= MAX_RECORD_TOKENS:
                self.end_shard(writer)

    def end_shard(self, writer: ShardWriter) -> None:
        """Writes the record at hand."""
        if not self._documents:
            return
        ids = FlatIds(self.facts.token_dtype)
        for document in self._documents:
            ids.append(document)
        facts = {"v": 1, "n": len(self._documents), "tokenizer": f"sha256:{self._tokenizer.digest}"}
        members = {"json": json.dumps(facts, sort_keys=True).encode()}
        writer.add_record(self._uids, members, ids, metas=self._metas)
        self.abandon()

    def abandon(self) -> None:
        """Forgets the record at hand."""
        self._documents: list[list[int]] = []
        self._uids: list[str] = []
        self._metas: list[Meta] = []
        self._num_tokens = 0


def cut_text(text: str, tokenizer: TextTokenizer, max_tokens: int) -> list[list[int]]:
    """Ids of a text in pieces of at most max_tokens (0: one piece): between paragraphs, else lines, else anywhere."""
    ids = tokenizer.encode(text)
    if not max_tokens or len(ids) <= max_tokens:
        return [ids]
    pieces: list[list[int]] = [[]]
    for unit in _units(text, tokenizer, max_tokens, _BORDERS):
        if len(pieces[-1]) + len(unit) > max_tokens:
            pieces.append([])
        pieces[-1] += unit
    return [piece for piece in pieces if piece]


def _units(
    text: str, tokenizer: TextTokenizer, max_tokens: int, borders: tuple[re.Pattern[str], ...]
) -> Iterator[list[int]]:
    """Stretches that stay together: paragraphs, the lines of those that are too long, runs of ids of longer lines."""
    if not borders:
        ids = tokenizer.encode(text)
        yield from (ids[start : start + max_tokens] for start in range(0, len(ids), max_tokens))
        return
    for part in borders[0].split(text):
        ids = tokenizer.encode(part)
        if len(ids) <= max_tokens:
            yield ids
        else:
            yield from _units(part, tokenizer, max_tokens, borders[1:])
