"""Text documents to block records of ids: `{"text": ...}` lines and plain text files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.prepare.directory import Facts
from data_pipeline.prepare.options import PrepareOptions, PrepareReport, Progress
from data_pipeline.prepare.records import RawRecord, text_field
from data_pipeline.prepare.run import run_prepare
from data_pipeline.prepare.shard import FlatIds, ShardWriter, identity_hashes, npy_bytes, token_dtype
from data_pipeline.text.interface import TextTokenizer


def prepare_text(
    inputs: Iterable[str | Path],
    out: str | Path,
    tokenizer: TextTokenizer,
    *,
    options: PrepareOptions | None = None,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes shards of kind text; continues where an earlier call was stopped.

    Every text is one document, however long: the plan cuts documents into rows. Empty texts are counted and left out.

    Raises:
        UserError: Bad input, or a directory that holds something else.
    """
    options = options or PrepareOptions()
    return run_prepare(_TextPreparer(tokenizer, options), inputs, Path(out), options, progress)


class _TextPreparer:
    """Collects documents and writes a record whenever one is full."""

    def __init__(self, tokenizer: TextTokenizer, options: PrepareOptions) -> None:
        self._tokenizer = tokenizer
        self._record_size = options.record_size
        self.facts = Facts(
            kind="text",
            text_tokenizer=tokenizer.digest,
            token_dtype=token_dtype(tokenizer),
            record_size=options.record_size,
        )
        self._documents: list[list[int]] = []
        self._names: list[str] = []

    def settings(self) -> dict[str, Any]:
        """What the bytes depend on."""
        return {"text_tokenizer": self._tokenizer.digest, "record_size": self._record_size}

    def add(self, record: RawRecord, writer: ShardWriter) -> None:
        """Adds one document."""
        fields = record.fields()
        ids = self._tokenizer.encode(text_field(fields, "text"))
        if not ids:
            writer.rejects["empty_text"] += 1
            return
        self._documents.append(ids)
        self._names.append(record.identity(fields))
        if len(self._documents) == self._record_size:
            self.end_shard(writer)

    def end_shard(self, writer: ShardWriter) -> None:
        """Writes the record at hand."""
        if not self._documents:
            return
        ids = FlatIds(self.facts.token_dtype)
        for document in self._documents:
            ids.append(document)
        facts = {"v": 1, "n": len(self._documents), "tokenizer": f"sha256:{self._tokenizer.digest}"}
        members = {
            "json": json.dumps(facts, sort_keys=True).encode(),
            "uid.npy": npy_bytes(identity_hashes(self._names)),
        }
        writer.add_record(writer.record_key(), members, ids, [])
        self._documents, self._names = [], []
