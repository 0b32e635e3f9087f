"""Documents of texts and pictures, questions about pictures and conversations, to one WebDataset sample each.

A sample holds doc.json (the segments with their texts, and facts such as license and size), tok.npy (the ids of all
texts, behind one another) and the pictures as the bytes they came in.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.prepare.directory import Facts
from data_pipeline.prepare.meta import sample_meta
from data_pipeline.prepare.options import PrepareOptions, PrepareReport, Progress
from data_pipeline.prepare.records import RawRecord, Reject
from data_pipeline.prepare.run import run_prepare
from data_pipeline.prepare.segments import DocumentSegments, PictureSegment, Segmenter, TextSegment
from data_pipeline.prepare.shard import ShardWriter, npy_bytes, token_dtype
from data_pipeline.prepare.task import Preparer
from data_pipeline.spec import Template
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.uid import uid_text

MAX_IMAGES = 255
"""Pictures of one document; the index counts them in a byte."""


def prepare_interleaved(
    inputs: Iterable[str | Path],
    out: str | Path,
    tokenizer: TextTokenizer,
    *,
    template: Template = Template.deepseek,
    options: PrepareOptions | None = None,
    progress: Progress | None = None,
) -> PrepareReport:
    """Writes shards of kind interleaved; continues where an earlier call was stopped.

    Records are `{"segments": [{"text": ..., "loss": true} | {"image": path}, ...]}`,
    `{"question": ..., "answer": ..., "image": path | "images": [path, ...], "system": ...}`,
    `{"conversation": [{"role": ..., "text": ...}, ...], "images": [path, ...]}`, or `{"image": path, "caption": ...}`.

    Args:
        inputs: Files or directories of any known format; picture paths are relative to the file that names them.
        out: Directory to write.
        tokenizer: Its ids are stored.
        template: Dialogue template of the questions; recorded if there are any.
        options: Common settings.
        progress: Called as records are done.

    Raises:
        UserError: Bad input, a picture that does not decode (unless skipped), or a directory that holds something else.
    """
    options = options or PrepareOptions()
    return run_prepare(_InterleavedPreparer(tokenizer, template, options), inputs, Path(out), options, progress)


class _InterleavedPreparer(Preparer):
    """Turns a record into segments and writes them at once."""

    def __init__(self, tokenizer: TextTokenizer, template: Template, options: PrepareOptions) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._segmenter = Segmenter(tokenizer, template, options.importing.on_missing_image)
        self._keep = options.importing.keep_columns
        self.facts = Facts(
            kind="interleaved",
            text_tokenizer=tokenizer.digest,
            token_dtype=token_dtype(tokenizer),
            template=template.value,
        )

    def settings(self) -> dict[str, Any]:
        """What the bytes depend on."""
        return {"text_tokenizer": self._tokenizer.digest, "template": self._template.value}

    def add(self, record: RawRecord, writer: ShardWriter) -> None:
        """Writes the documents of a record.

        Raises:
            Reject: The record is no document, or a picture is missing or does not decode.
        """
        fields = record.fields()
        identity = record.identity(fields)
        for number, segments in enumerate(self._segmenter.documents(record, fields, writer)):
            self._write(f"{identity}#{number}" if number else identity, segments, fields, writer)
        writer.uses_template |= "question" in fields or "conversation" in fields

    def _write(self, identity: str, segments: DocumentSegments, fields: dict[str, Any], writer: ShardWriter) -> None:
        """Writes one document."""
        texts = [segment for segment in segments if isinstance(segment, TextSegment)]
        pictures = [segment for segment in segments if isinstance(segment, PictureSegment)]
        if len(pictures) > MAX_IMAGES:
            raise Reject("too_many_images", f"{len(pictures)} images in a document, at most {MAX_IMAGES} are allowed")
        if not any(text.has_loss for text in texts):
            raise Reject("nothing_to_learn", "no text with loss in this document")
        members: dict[str, bytes] = {}
        sequence: list[dict[str, Any]] = []
        for segment in segments:
            if isinstance(segment, TextSegment):
                sequence.append({"t": "text", "n": len(segment.ids), "loss": segment.has_loss, "s": segment.text})
            else:
                name = f"{len(members)}.{segment.extension}"
                members[name] = segment.content
                sequence.append({"t": "image", "name": name})
        first = pictures[0] if pictures else None
        is_pair = "caption" in fields or "captions" in fields
        meta = sample_meta(
            fields,
            self._keep,
            size=(first.width, first.height) if first else None,
            caption=texts[-1].text if is_pair else None,
            picture=first.content if first else None,
        )
        uid = uid_text(identity)
        document = {"v": 1, "uid": uid, "id": identity, "seq": sequence, "meta": meta}
        members["doc.json"] = json.dumps(document, ensure_ascii=False).encode()
        ids = [i for text in texts for i in text.ids]
        members["tok.npy"] = npy_bytes(np.array(ids, self.facts.token_dtype))
        writer.add_sample(uid, members, len(ids), len(pictures), meta)
