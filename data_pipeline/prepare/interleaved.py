"""Documents of texts and pictures, and questions about pictures, to one WebDataset sample each.

A sample holds doc.json (the segments with their texts), tok.npy (the ids of all texts, behind one another) and the
pictures as the bytes they came in. Questions are rendered with the dialogue template here, where their text is known:
everything up to the assistant's colon without loss, the answer with loss.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.dialogue import IMAGE, Piece, answer_text, encode_pieces, pieces_text, question_pieces
from data_pipeline.images import ImageError, decode_image, image_extension
from data_pipeline.prepare.directory import Facts
from data_pipeline.prepare.options import PrepareOptions, PrepareReport, Progress
from data_pipeline.prepare.records import RawRecord, Reject, checked_text, text_field
from data_pipeline.prepare.run import run_prepare
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

    Records are `{"segments": [{"text": ..., "loss": true} | {"image": path}, ...]}` or
    `{"question": ..., "answer": ..., "image": path | "images": [path, ...], "system": ...}`.

    Args:
        inputs: .jsonl files or directories of such; picture paths are relative to the file that names them.
        out: Directory to write.
        tokenizer: Its ids are stored.
        template: Dialogue template of the questions; recorded if there are any.
        options: Common settings.
        progress: Called as records are done.

    Raises:
        UserError: Bad input, a picture that does not decode (unless skipped), or a directory that holds something else.
    """
    options = options or PrepareOptions()
    return run_prepare(_InterleavedPreparer(tokenizer, template), inputs, Path(out), options, progress)


@dataclass(frozen=True, slots=True)
class _Text:
    """A text segment: for people and for the model."""

    text: str
    ids: list[int]
    has_loss: bool


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture segment: the stored bytes."""

    content: bytes
    extension: str


class _InterleavedPreparer(Preparer):
    """Turns a record into segments and writes them at once."""

    def __init__(self, tokenizer: TextTokenizer, template: Template) -> None:
        self._tokenizer = tokenizer
        self._template = template
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
        """Writes one document.

        Raises:
            Reject: The record is no document, or a picture is missing or does not decode.
        """
        fields = record.fields()
        is_question = "question" in fields
        segments = self._question(record, fields) if is_question else self._segments(record, fields)
        texts = [segment for segment in segments if isinstance(segment, _Text)]
        num_images = len(segments) - len(texts)
        if num_images > MAX_IMAGES:
            raise Reject("too_many_images", f"{num_images} images in one document, at most {MAX_IMAGES} are allowed")
        if not any(text.has_loss for text in texts):
            raise Reject("nothing_to_learn", "no text with loss in this document")
        members: dict[str, bytes] = {}
        sequence: list[dict[str, Any]] = []
        for segment in segments:
            if isinstance(segment, _Text):
                sequence.append({"t": "text", "n": len(segment.ids), "loss": segment.has_loss, "s": segment.text})
            else:
                name = f"{len(members)}.{segment.extension}"
                members[name] = segment.content
                sequence.append({"t": "image", "name": name})
        identity = record.identity(fields)
        uid = uid_text(identity)
        document = {"v": 1, "uid": uid, "id": identity, "seq": sequence}
        members["doc.json"] = json.dumps(document, ensure_ascii=False).encode()
        ids = [i for text in texts for i in text.ids]
        members["tok.npy"] = npy_bytes(np.array(ids, self.facts.token_dtype))
        writer.add_sample(uid, members, len(ids), num_images)
        writer.uses_template |= is_question

    def end_shard(self, writer: ShardWriter) -> None:
        """Nothing is held back."""

    def _segments(self, record: RawRecord, fields: dict[str, Any]) -> list[_Text | _Picture]:
        """A document given by its segments."""
        given = fields.get("segments")
        if not isinstance(given, list) or not given:
            raise Reject("bad_record", "the record has neither 'segments' (a list) nor 'question' and 'answer'")
        segments: list[_Text | _Picture] = []
        for part in given:
            if not isinstance(part, dict) or ("text" in part) == ("image" in part):
                raise Reject("bad_record", "a segment must have either 'text' or 'image'")
            if "image" in part:
                segments.append(_picture(record, part["image"]))
                continue
            has_loss = part.get("loss", True)
            if not isinstance(has_loss, bool):
                raise Reject("bad_record", "'loss' of a segment must be true or false")
            text = text_field(part, "text")
            if text:
                segments.append(_Text(text, self._tokenizer.encode(text), has_loss))
        return segments

    def _question(self, record: RawRecord, fields: dict[str, Any]) -> list[_Text | _Picture]:
        """A question with its pictures and the answer, rendered with the template."""
        names = fields.get("images", [fields["image"]] if "image" in fields else [])
        if not isinstance(names, list):
            raise Reject("bad_record", "'images' must be a list of paths")
        pictures = [_picture(record, name) for name in names]
        answer = text_field(fields, "answer")
        if not answer.strip():
            raise Reject("empty_text", "the answer is empty")
        system = checked_text(fields.get("system", ""), "system")
        pieces = question_pieces(self._template, text_field(fields, "question"), len(pictures), system)
        segments: list[_Text | _Picture] = []
        for is_image, group in groupby(pieces, lambda piece: piece == IMAGE):
            if is_image:
                segments += [pictures.pop(0) for _ in group]
            else:
                segments.append(self._prompt_text(list(group)))
        answer = answer_text(answer)
        return [*segments, _Text(answer, self._tokenizer.encode(answer), has_loss=True)]

    def _prompt_text(self, pieces: list[Piece]) -> _Text:
        return _Text(pieces_text(pieces), encode_pieces(self._tokenizer, pieces), has_loss=False)


def _picture(record: RawRecord, name: Any) -> _Picture:
    """Reads a picture and makes sure that it decodes."""
    content = record.picture(name)
    try:
        decode_image(content)
        return _Picture(content, image_extension(content))
    except ImageError as error:
        raise Reject("undecodable_image", f"image {name!r} is no usable picture: {error}") from error
