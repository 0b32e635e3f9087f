"""From the fields of a record to the segments of its documents: texts as ids, pictures as the bytes they came in.

Questions and conversations are rendered with the dialogue template here, where their text is known: everything up to
the assistant's colon without loss, answers with loss, and with the eos that ends each of them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from data_pipeline.dialogue import (
    IMAGE,
    Piece,
    Turn,
    answer_text,
    conversation_pieces,
    encode_pieces,
    message_pieces,
    pair_text,
    pieces_text,
    question_pieces,
)
from data_pipeline.images import ImageError, decode_image, image_extension
from data_pipeline.prepare.importers.conversations import IMAGE_MARK
from data_pipeline.prepare.importing import OnMissingImage
from data_pipeline.prepare.records import RawRecord, Reject, checked_text, text_field
from data_pipeline.prepare.shard import ShardWriter
from data_pipeline.spec import Template
from data_pipeline.text.interface import TextTokenizer


@dataclass(frozen=True, slots=True)
class TextSegment:
    """A text segment: for people and for the model."""

    text: str
    ids: list[int]
    has_loss: bool


@dataclass(frozen=True, slots=True)
class PictureSegment:
    """A picture segment: the stored bytes."""

    content: bytes
    extension: str
    width: int
    height: int


DocumentSegments = list[TextSegment | PictureSegment]


@dataclass(frozen=True, slots=True)
class Segmenter:
    """Makes segments for one tokenizer and template."""

    tokenizer: TextTokenizer
    template: Template
    on_missing_image: OnMissingImage

    def documents(self, record: RawRecord, fields: dict[str, Any], writer: ShardWriter) -> list[DocumentSegments]:
        """The documents of a record: one, or one per caption of a picture.

        Raises:
            Reject: The record is no document, or a picture is missing or does not decode.
        """
        if "conversation" in fields:
            return [self._conversation(record, fields)]
        if "question" in fields:
            return [self._question(record, fields)]
        if "segments" not in fields and "image" in fields and ("caption" in fields or "captions" in fields):
            picture = read_checked_picture(record, fields["image"])
            return [[picture, self._text(pair_text(caption), True)] for caption in captions_of(fields)]
        return [self._segments(record, fields, writer)]

    def _segments(self, record: RawRecord, fields: dict[str, Any], writer: ShardWriter) -> DocumentSegments:
        """A document given by its segments."""
        given = fields.get("segments")
        if not isinstance(given, list) or not given:
            raise Reject(
                "bad_record",
                "the record has neither 'segments' (a list) nor 'question' and 'answer', 'conversation', or 'image' "
                f"and 'caption'; it has {', '.join(sorted(fields)[:20])}",
            )
        segments: DocumentSegments = []
        for part in given:
            if not isinstance(part, dict) or ("text" in part) == ("image" in part):
                raise Reject("bad_record", "a segment must have either 'text' or 'image'")
            if "image" in part:
                segments += self._picture(record, part["image"], writer)
                continue
            has_loss = part.get("loss", True)
            if not isinstance(has_loss, bool):
                raise Reject("bad_record", "'loss' of a segment must be true or false")
            text = text_field(part, "text")
            if text:
                segments.append(self._text(text, has_loss))
        return segments

    def _picture(self, record: RawRecord, name: Any, writer: ShardWriter) -> list[PictureSegment]:
        """The picture, or nothing where those that cannot be used are dropped."""
        try:
            return [read_checked_picture(record, name)]
        except Reject as reject:
            may_drop = reject.reason in ("missing_image", "undecodable_image", "too_large")
            if self.on_missing_image is not OnMissingImage.drop or not may_drop:
                raise
            writer.rejects["dropped_image"] += 1
            return []

    def _question(self, record: RawRecord, fields: dict[str, Any]) -> DocumentSegments:
        """A question with its pictures and the answer."""
        pictures = _pictures(record, fields)
        answer = text_field(fields, "answer")
        if not answer.strip():
            raise Reject("empty_text", "the answer is empty")
        system = checked_text(fields.get("system", ""), "system")
        pieces = question_pieces(self.template, text_field(fields, "question"), len(pictures), system)
        return [*self._stretch(pieces, False, pictures), self._text(answer_text(answer), True)]

    def _conversation(self, record: RawRecord, fields: dict[str, Any]) -> DocumentSegments:
        """Turns of user and assistant; pictures where they are called."""
        system, messages, answers = _turns(fields)
        pictures = _pictures(record, fields)
        num_called = sum(message.count(IMAGE_MARK) for message in messages)
        if num_called != len(pictures) and num_called:
            raise Reject("image_mismatch", f"{num_called} {IMAGE_MARK} in the turns but {len(pictures)} images")
        in_front = 0 if num_called else len(pictures)
        turns: list[Turn] = []
        for number, (message, answer) in enumerate(zip(messages, answers, strict=True)):
            turns.append(Turn(_message(message, 0 if number else in_front), answer))
        segments: DocumentSegments = []
        for pieces, has_loss in conversation_pieces(self.template, turns, system):
            segments += self._stretch(pieces, has_loss, pictures)
        return segments

    def _stretch(self, pieces: Iterable[Piece], has_loss: bool, pictures: list[PictureSegment]) -> DocumentSegments:
        """Pieces as segments; takes the pictures they call from the front of the list."""
        segments: DocumentSegments = []
        for is_image, run in groupby(pieces, lambda piece: piece == IMAGE):
            group = list(run)
            if is_image:
                segments += [pictures.pop(0) for _ in group]
            else:
                segments.append(TextSegment(pieces_text(group), encode_pieces(self.tokenizer, group), has_loss))
        return segments

    def _text(self, text: str, has_loss: bool) -> TextSegment:
        return TextSegment(text, self.tokenizer.encode(text), has_loss)


def read_checked_picture(record: RawRecord, name: Any) -> PictureSegment:
    """Reads a picture and makes sure that it decodes.

    Raises:
        Reject: It is missing, too large, or no picture.
    """
    content = record.picture(name)
    try:
        height, width, _ = decode_image(content).shape
        return PictureSegment(content, image_extension(content), width, height)
    except ImageError as error:
        raise Reject("undecodable_image", f"image {name!r} is no usable picture: {error}") from error


def captions_of(fields: dict[str, Any]) -> list[str]:
    """The captions of a record that are not empty.

    Raises:
        Reject: There is none.
    """
    given = fields.get("captions")
    if given is None:
        texts = [text_field(fields, "caption")]
    elif isinstance(given, list):
        texts = [checked_text(caption, "captions") for caption in given]
    else:
        raise Reject("bad_record", "'captions' must be a list of texts")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise Reject("empty_text", "the caption is empty")
    return texts


def _pictures(record: RawRecord, fields: dict[str, Any]) -> list[PictureSegment]:
    """All pictures of a question or conversation; one that is missing spoils it."""
    names = fields.get("images", [fields["image"]] if "image" in fields else [])
    if not isinstance(names, list):
        raise Reject("bad_record", "'images' must be a list of paths")
    return [read_checked_picture(record, name) for name in names]


def _turns(fields: dict[str, Any]) -> tuple[str, list[str], list[str]]:
    """System prompt, messages and answers of a conversation.

    Raises:
        Reject: Roles do not take turns, an answer is empty, or somebody else than the user calls a picture.
    """
    given = fields["conversation"]
    if not isinstance(given, list) or not all(isinstance(turn, dict) for turn in given):
        raise Reject("bad_record", "'conversation' must be a list of turns")
    turns = [(turn.get("role"), text_field(turn, "text")) for turn in given]
    system = checked_text(fields.get("system", ""), "system")
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [role for role, _ in turns] != expected:
        raise Reject("bad_roles", "after a system turn, user and assistant must take turns, the assistant last")
    messages, answers = [text for _, text in turns[::2]], [text for _, text in turns[1::2]]
    if not all(answer.strip() for answer in answers):
        raise Reject("empty_text", "an answer is empty")
    if any(IMAGE_MARK in text for text in (system, *answers)):
        raise Reject("image_mismatch", f"{IMAGE_MARK} in an answer or the system prompt; only users show pictures")
    return system, messages, answers


def _message(text: str, in_front: int) -> tuple[Piece, ...]:
    """A user's turn. Pictures called at its beginning, or at its end alone, come first; others stay where they are."""
    parts = text.split(IMAGE_MARK)
    while len(parts) > 1 and not parts[0].strip():
        del parts[0]
        in_front += 1
    if not any(part.strip() for part in parts[1:]):
        in_front += len(parts) - 1
        del parts[1:]
    if len(parts) == 1:
        return message_pieces(parts[0], in_front)
    parts[0], parts[-1] = parts[0].lstrip(), parts[-1].rstrip()
    inside = [piece for part in parts for piece in (Piece(part), IMAGE)][:-1]
    return (*message_pieces("", in_front), *(piece for piece in inside if piece.text))
