"""From samples to documents: special tokens, templates, labels, guidance pads. The one place for all of it.

Prepare renders questions with it, assembly builds training documents, inference and export render the same prompts.
Every prompt is cut into pieces whose borders are special tokens wherever the template has one, and each piece of text
is tokenized on its own; so a training document starts with exactly the ids that inference feeds, and a processor that
tokenizes the whole prompt string finds the same ids (checked when a builder is made).

Published facts followed here: an image to understand is begin-of-image, placeholders, end-of-image; begin-of-image also
opens an image to draw; drawing has no system prompt; an empty assistant turn ends in a colon without a space.
Labels are shifted: `labels[i]` is what position i predicts. Shape letter: `n` tokens of a document.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.manifest import Source
from data_pipeline.schema import Document, LabelHead, Sample, Segment, TaskId, TokenKind
from data_pipeline.spec import ImageGeometry, Template
from data_pipeline.text import special
from data_pipeline.text.interface import TextTokenizer

SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""DeepSeek's system prompt of understanding dialogues; nothing adds it unasked."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt: plain text, or one special token by its string."""

    text: str
    is_special: bool = False


IMAGE = Piece(special.IMAGE_PLACEHOLDER, is_special=True)
"""One image to understand, as prompt strings write it (processors expand it to the whole block)."""


def _roles(template: Template) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """What opens the user's and the assistant's turn, before the colon."""
    if template is Template.deepseek:
        return (Piece(special.USER, is_special=True),), (Piece(special.ASSISTANT, is_special=True),)
    return (Piece("User"),), (Piece("Assistant"),)


def _join(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """Joins neighbouring texts, so that only special tokens are borders."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and not piece.is_special and not joined[-1].is_special:
            joined[-1] = Piece(joined[-1].text + piece.text)
        elif piece.text:
            joined.append(piece)
    return tuple(joined)


def question_pieces(template: Template, question: str, num_images: int = 0, system: str = "") -> tuple[Piece, ...]:
    """A question about images, up to the colon of the assistant's turn (without bos).

    Images come first, each followed by a newline, as DeepSeek's examples have it.
    """
    return _asked(template, message_pieces(question, num_images), system)


def message_pieces(text: str, num_images: int = 0) -> tuple[Piece, ...]:
    """What a user says: images first, each followed by a newline, then the text."""
    images = [piece for _ in range(num_images) for piece in (IMAGE, Piece("\n"))]
    return _join((*images, Piece(text.strip())))


def _asked(template: Template, message: Iterable[Piece], system: str) -> tuple[Piece, ...]:
    user, assistant = _roles(template)
    opening = Piece(f"{system.strip()}\n\n" if system.strip() else "")
    return _join((opening, *user, Piece(": "), *message, Piece("\n\n"), *assistant, Piece(":")))


@dataclass(frozen=True, slots=True)
class Turn:
    """What the user said, images where they stand in it, and the answer."""

    message: tuple[Piece, ...]
    answer: str


def conversation_pieces(
    template: Template, turns: Sequence[Turn], system: str = ""
) -> tuple[tuple[tuple[Piece, ...], bool], ...]:
    """A conversation as stretches, each with whether it is learnt: prompt, answer, prompt, answer...

    As DeepSeek renders it: every answer ends in eos and the next user's turn follows that at once. The last answer is
    given without eos, because documents end in one. The first prompt is that of `question_pieces`.
    """
    stretches: list[tuple[tuple[Piece, ...], bool]] = []
    for number, turn in enumerate(turns):
        is_last = number == len(turns) - 1
        end = () if is_last else (Piece(special.EOS, is_special=True),)
        stretches.append((_asked(template, turn.message, "" if number else system), False))
        stretches.append(((Piece(answer_text(turn.answer)), *end), True))
    return tuple(stretches)


def pair_text(caption: str) -> str:
    """A caption as it follows its image, where the two alone are a document."""
    return caption.strip()


def answer_text(answer: str) -> str:
    """An answer as it follows the assistant's colon; eos comes after it."""
    return " " + answer.strip()


def caption_text(caption: str) -> str:
    """A caption as it follows the user's colon; its ids are what t2i shards store."""
    return " " + caption.strip()


def generation_pieces(template: Template, caption: str) -> tuple[Piece, ...]:
    """A request to draw, up to and with begin-of-image (without bos)."""
    before, after = _around_caption(template)
    return _join((*before, Piece(caption_text(caption)), *after))


def _around_caption(template: Template) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    user, assistant = _roles(template)
    opened = _join((*assistant, Piece(":")))
    return _join((*user, Piece(":"))), _join((Piece("\n\n"), *opened, Piece(special.BEGIN_OF_IMAGE, is_special=True)))


def pieces_text(pieces: Iterable[Piece]) -> str:
    """The prompt as one string, the way a Hugging Face processor takes it."""
    return "".join(piece.text for piece in pieces)


def encode_pieces(tokenizer: TextTokenizer, pieces: Iterable[Piece]) -> list[int]:
    """Ids of pieces, each tokenized on its own; texts never become special tokens."""
    ids: list[int] = []
    for piece in pieces:
        ids += [tokenizer.id_of(piece.text)] if piece.is_special else tokenizer.encode(piece.text)
    return ids


def prompt_segments(tokenizer: TextTokenizer, pieces: Iterable[Piece], has_loss: bool = False) -> tuple[Segment, ...]:
    """Pieces as segments: ids between images, images numbered from 0 in order."""
    segments: list[Segment] = []
    ids: list[int] = []
    num_images = 0
    for piece in pieces:
        if piece != IMAGE:
            ids += encode_pieces(tokenizer, [piece])
            continue
        if ids:
            segments.append(Segment(np.array(ids, np.int32), has_loss=has_loss))
        segments.append(Segment(image=num_images, has_loss=False))
        ids, num_images = [], num_images + 1
    if ids:
        segments.append(Segment(np.array(ids, np.int32), has_loss=has_loss))
    return tuple(segments)


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Ids of the special tokens that documents are built with."""

    bos: int
    eos: int
    pad: int
    image_placeholder: int
    begin_of_image: int
    end_of_image: int


def special_ids(tokenizer: TextTokenizer) -> SpecialIds:
    """Looks the special tokens up by string.

    Raises:
        UserError: The tokenizer lacks one.
    """
    return SpecialIds(
        bos=tokenizer.id_of(special.BOS),
        eos=tokenizer.id_of(special.EOS),
        pad=tokenizer.id_of(special.PAD),
        image_placeholder=tokenizer.id_of(special.IMAGE_PLACEHOLDER),
        begin_of_image=tokenizer.id_of(special.BEGIN_OF_IMAGE),
        end_of_image=tokenizer.id_of(special.END_OF_IMAGE),
    )


class DialogueBuilder:
    """Builds training documents and inference prompts for one tokenizer, template and image geometry."""

    def __init__(self, tokenizer: TextTokenizer, template: Template, geometry: ImageGeometry) -> None:
        """Looks special tokens up and checks that prompts may be tokenized in pieces.

        Raises:
            UserError: A special token is missing, or the tokenizer merges over the borders of the template.
        """
        self.tokenizer = tokenizer
        self.template = template
        self.geometry = geometry
        self.ids = special_ids(tokenizer)
        before, after = _around_caption(template)
        self._before_caption = np.array([self.ids.bos, *encode_pieces(tokenizer, before)], np.int32)
        self._after_caption = np.array(encode_pieces(tokenizer, after), np.int32)
        image_block = [self.ids.image_placeholder] * geometry.understanding_tokens
        self._image_block = np.array([self.ids.begin_of_image, *image_block, self.ids.end_of_image], np.int32)
        self._check_borders()

    def _check_borders(self) -> None:
        """Compares pieces with the whole string on a prompt of each kind."""
        draw = self.generation_prompt("a small red square").tolist()
        whole_draw = self.tokenizer.encode_with_special(
            pieces_text(generation_pieces(self.template, "a small red square"))
        )
        ask = encode_pieces(self.tokenizer, question_pieces(self.template, "Which colour?", num_images=1))
        answer = self.tokenizer.encode(answer_text("red"))
        whole_ask = self.tokenizer.encode_with_special(
            pieces_text(question_pieces(self.template, "Which colour?", num_images=1)) + answer_text("red")
        )
        if draw[1:] != whole_draw or ask + answer != whole_ask:
            raise UserError(
                f"{self.tokenizer.path}: the tokenizer merges text across the turns of template "
                f"{self.template.value}, so prompts would differ between training and inference; "
                "use one without dummy prefix that keeps spaces with the word after them and newlines alone"
            )

    @property
    def around_caption(self) -> tuple[np.ndarray, np.ndarray]:
        """int32: what stands before the caption of a drawing (bos and on) and after it (up to begin-of-image)."""
        return self._before_caption, self._after_caption

    # ---- prompts -------------------------------------------------------------------------------------------------

    def render_generation_prompt(self, caption_ids: np.ndarray | Sequence[int]) -> np.ndarray:
        """int32 [n]: bos, user turn with the caption, open assistant turn, begin-of-image."""
        caption = np.asarray(caption_ids, np.int32)
        return np.concatenate([self._before_caption, caption, self._after_caption])

    def generation_prompt(self, caption: str) -> np.ndarray:
        """int32 [n]: the prompt of a caption given as text."""
        return self.render_generation_prompt(self.tokenizer.encode(caption_text(caption)))

    def unconditional_prompt(self, prompt: np.ndarray) -> np.ndarray:
        """int32 [n]: the same prompt for the unconditional branch: pads between bos and begin-of-image."""
        padded = np.array(prompt, np.int32)
        padded[1:-1] = self.ids.pad
        return padded

    def question_prompt(self, question: str, num_images: int = 0, system: str = "") -> np.ndarray:
        """int32 [n]: bos, image blocks and question, up to the assistant's colon."""
        pieces = question_pieces(self.template, question, num_images, system)
        return self.segments_prompt(prompt_segments(self.tokenizer, pieces))

    def interleaved_prompt(self, parts: Sequence[str | None]) -> np.ndarray:
        """int32 [n]: bos and the beginning of an interleaved document; None stands for an image."""
        segments = [
            Segment(image=0) if part is None else Segment(np.array(self.tokenizer.encode(part), np.int32))
            for part in parts
        ]
        return self.segments_prompt(segments)

    def segments_prompt(self, segments: Sequence[Segment]) -> np.ndarray:
        """int32 [n]: bos and the segments in order, images as whole blocks."""
        return np.concatenate([np.array([self.ids.bos], np.int32), *(self._segment_ids(s) for s in segments)])

    def _segment_ids(self, segment: Segment) -> np.ndarray:
        return self._image_block if segment.text_ids is None else np.asarray(segment.text_ids, np.int32)

    # ---- documents -----------------------------------------------------------------------------------------------

    def document_lengths(self, source: Source) -> np.ndarray:
        """int32 [N]: exact tokens of every sample's document, from the index alone.

        Raises:
            UserError: The source was prepared with another tokenizer, template or image geometry.
        """
        self.check_source(source)
        text = source.num_text_tokens.astype(np.int32)
        if source.kind == "t2i":
            around = len(self._before_caption) + len(self._after_caption)
            return text + np.int32(around + self.geometry.generation_tokens + 1)
        return text + source.num_und_images.astype(np.int32) * np.int32(len(self._image_block)) + np.int32(2)

    def check_source(self, source: Source) -> None:
        """Refuses a source whose stored ids mean something else here.

        Raises:
            UserError: Naming both digests, templates or geometries.
        """
        manifest = source.manifest
        if manifest.text_tokenizer != self.tokenizer.digest:
            raise UserError(
                f"{source.path}: its shards hold ids of the text tokenizer sha256 {manifest.text_tokenizer}, but "
                f"{self.tokenizer.path} is sha256 {self.tokenizer.digest}; give the tokenizer of the shards or prepare "
                "them again"
            )
        if manifest.template not in (None, self.template.value):
            raise UserError(
                f"{source.path}: its questions are rendered with template {manifest.template}, the run uses "
                f"{self.template.value}; set data.template={manifest.template} or prepare them again"
            )
        images = manifest.image_tokenizer
        ours = (self.geometry.generation_size, self.geometry.generation_tokens, self.geometry.codebook_size)
        if images is not None and (images.image_size, images.num_tokens, images.codebook_size) != ours:
            raise UserError(
                f"{source.path}: its image ids are {images.num_tokens} of {images.codebook_size} codes for "
                f"{images.image_size} px, data.geometry says {ours[1]} of {ours[2]} for {ours[0]} px; make them equal"
            )

    def build_document(self, sample: Sample, task: TaskId | int, drop_prompt: bool = False) -> Document:
        """The training document of a sample; its length is what `document_lengths` says.

        Args:
            sample: As read; with image ids it is drawn, else its segments are read.
            task: Which loss its labels count towards.
            drop_prompt: Guidance dropout: the prompt becomes pads except bos and begin-of-image.
        """
        if sample.image_ids is not None:
            return self._drawing(sample, int(task), drop_prompt)
        return self._reading(sample, int(task))

    def _drawing(self, sample: Sample, task: int, drop_prompt: bool) -> Document:
        """bos, prompt, begin-of-image, image ids, end-of-image; only image ids are predicted."""
        assert sample.caption_ids is not None and sample.image_ids is not None
        prompt = self.render_generation_prompt(sample.caption_ids)
        if drop_prompt:
            prompt = self.unconditional_prompt(prompt)
        image_ids = sample.image_ids.astype(np.int32)
        input_ids = np.concatenate([prompt, image_ids, np.array([self.ids.end_of_image], np.int32)])
        is_image = np.zeros(len(input_ids), bool)
        is_image[len(prompt) : -1] = True
        token_kind = np.where(is_image, TokenKind.image_gen, TokenKind.text).astype(np.uint8)
        labels, label_head = _shifted(input_ids, is_image, LabelHead.image)
        return Document(input_ids, token_kind, labels, label_head, task)

    def _reading(self, sample: Sample, task: int) -> Document:
        """bos, segments, eos; predicted are the texts that have a loss, and eos after a last text that has one."""
        ids = [np.array([self.ids.bos], np.int32)]
        kinds = [np.zeros(1, np.uint8)]
        trained = [np.zeros(1, bool)]
        last_text_trained = False
        for segment in sample.segments:
            ids.append(self._segment_ids(segment))
            kinds.append(np.zeros(len(ids[-1]), np.uint8))
            trained.append(np.full(len(ids[-1]), segment.text_ids is not None and segment.has_loss))
            if segment.text_ids is None:
                kinds[-1][1:-1] = TokenKind.image_und
            else:
                last_text_trained = segment.has_loss
        ids.append(np.array([self.ids.eos], np.int32))
        kinds.append(np.zeros(1, np.uint8))
        trained.append(np.array([last_text_trained]))
        input_ids = np.concatenate(ids)
        labels, label_head = _shifted(input_ids, np.concatenate(trained), LabelHead.text)
        images = tuple(sample.images[segment.image] for segment in sample.segments if segment.text_ids is None)
        return Document(input_ids, np.concatenate(kinds), labels, label_head, task, images)


def _shifted(input_ids: np.ndarray, trained: np.ndarray, head: LabelHead) -> tuple[np.ndarray, np.ndarray]:
    """Labels int32 [n] and heads uint8 [n]: position i predicts token i + 1 where that token is trained."""
    labels = np.zeros(len(input_ids), np.int32)
    label_head = np.zeros(len(input_ids), np.uint8)
    where = np.flatnonzero(trained[1:])
    labels[where] = input_ids[where + 1]
    label_head[where] = head
    return labels, label_head
