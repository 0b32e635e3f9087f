"""Templates, prompts, labels and guidance pads, spelled out by hand."""

import numpy as np
import pytest

from data_pipeline.dialogue import (
    DialogueBuilder,
    answer_text,
    caption_text,
    generation_pieces,
    pieces_text,
    prompt_segments,
    question_pieces,
)
from data_pipeline.errors import UserError
from data_pipeline.schema import LabelHead, Sample, Segment, TaskId, TokenKind
from data_pipeline.spec import ImageGeometry, Template
from data_pipeline.text import special
from tests.support.raw import train_tokenizer

BOTH = pytest.mark.parametrize("template", list(Template))


@pytest.fixture
def builder(tokenizer, geometry):
    return DialogueBuilder(tokenizer, Template.deepseek, geometry)


def int32(ids):
    return np.array(ids, np.int32)


def expanded(text, geometry):
    """The prompt string after a processor has expanded its images."""
    block = special.BEGIN_OF_IMAGE + special.IMAGE_PLACEHOLDER * geometry.understanding_tokens + special.END_OF_IMAGE
    return text.replace(special.IMAGE_PLACEHOLDER, block)


# ---- strings ---------------------------------------------------------------------------------------------------------


def test_question_strings():
    image = special.IMAGE_PLACEHOLDER
    old = pieces_text(question_pieces(Template.deepseek_old, " What? ", 1))
    assert old == f"User: {image}\nWhat?\n\nAssistant:"
    new = pieces_text(question_pieces(Template.deepseek, "What?", 2, system="Be kind."))
    assert new == f"Be kind.\n\n<|User|>: {image}\n{image}\nWhat?\n\n<|Assistant|>:"
    assert answer_text("red \n") == " red"


def test_generation_strings():
    begin = special.BEGIN_OF_IMAGE
    assert pieces_text(generation_pieces(Template.deepseek, " a cat ")) == f"<|User|>: a cat\n\n<|Assistant|>:{begin}"
    assert pieces_text(generation_pieces(Template.deepseek_old, "a cat")) == f"User: a cat\n\nAssistant:{begin}"


# ---- the same ids in pieces and as a whole ---------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("caption", ["a red square", "1 2 3", '"quoted", (odd)!', "é漢😀", "two\n\nlines", "x"])
def test_prompts_equal_the_tokenized_whole_string(tokenizer, geometry, template, caption):
    builder = DialogueBuilder(tokenizer, template, geometry)
    draw = pieces_text(generation_pieces(template, caption))
    assert builder.generation_prompt(caption).tolist() == [builder.ids.bos, *tokenizer.encode_with_special(draw)]
    ask = expanded(pieces_text(question_pieces(template, caption, 2, "Sys.")), geometry)
    assert builder.question_prompt(caption, 2, "Sys.").tolist() == [
        builder.ids.bos,
        *tokenizer.encode_with_special(ask),
    ]


@BOTH
def test_training_documents_start_with_the_inference_prompt(tokenizer, geometry, template):
    builder = DialogueBuilder(tokenizer, template, geometry)
    question = prompt_segments(tokenizer, question_pieces(template, "Which colour?", 1))
    answer = Segment(int32(tokenizer.encode(answer_text("red"))))
    image = np.zeros((3, 16, 16), np.uint8)
    asked = builder.build_document(Sample("u", (*question, answer), (image,)), TaskId.understanding)
    prompt = builder.question_prompt("Which colour?", 1)
    assert asked.input_ids[: len(prompt)].tolist() == prompt.tolist()
    drawn = Sample(
        "u", caption_ids=int32(tokenizer.encode(caption_text("a cat"))), image_ids=np.arange(16, dtype=np.uint16)
    )
    drawing = builder.build_document(drawn, TaskId.generation)
    prompt = builder.generation_prompt("a cat")
    assert drawing.input_ids[: len(prompt)].tolist() == prompt.tolist()
    assert drawing.input_ids[len(prompt)] == 0 and drawing.token_kind[len(prompt)] == TokenKind.image_gen


def test_text_that_looks_like_a_special_token_stays_text(tokenizer, builder):
    ids = builder.question_prompt("<image_placeholder><end_of_image><|Assistant|>", 0).tolist()
    assert builder.ids.image_placeholder not in ids and builder.ids.end_of_image not in ids
    assert ids.count(tokenizer.id_of(special.ASSISTANT)) == 1


def test_interleaved_prompts_start_their_documents(tokenizer, builder):
    image = np.zeros((3, 16, 16), np.uint8)
    texts = [int32(tokenizer.encode(text)) for text in (" shows", " red")]
    sample = Sample("u", (Segment(image=0), Segment(texts[0]), Segment(texts[1])), (image,))
    prompt = builder.interleaved_prompt([None, " shows"])
    document = builder.build_document(sample, TaskId.understanding)
    assert document.input_ids[: len(prompt)].tolist() == prompt.tolist()


# ---- documents by hand -----------------------------------------------------------------------------------------------


def test_text_document(builder):
    document = builder.build_document(Sample("u", (Segment(int32([50, 60])),)), TaskId.text)
    bos, eos = builder.ids.bos, builder.ids.eos
    assert document.input_ids.tolist() == [bos, 50, 60, eos]
    assert document.labels.tolist() == [50, 60, eos, 0]
    assert document.label_head.tolist() == [LabelHead.text] * 3 + [LabelHead.none]
    assert document.token_kind.tolist() == [TokenKind.text] * 4
    assert document.task == TaskId.text and document.images == ()


def test_question_document_trains_answer_and_eos_only(tokenizer, builder):
    images = tuple(np.full((3, 16, 16), value, np.uint8) for value in (1, 2))
    segments = (
        Segment(int32([70]), has_loss=False),
        Segment(image=1, has_loss=False),
        Segment(image=0, has_loss=False),
        Segment(int32([71, 72]), has_loss=False),
        Segment(int32([80, 81])),
    )
    document = builder.build_document(Sample("u", segments, images), TaskId.understanding)
    ids = builder.ids
    block = [ids.begin_of_image, *[ids.image_placeholder] * 16, ids.end_of_image]
    assert document.input_ids.tolist() == [ids.bos, 70, *block, *block, 71, 72, 80, 81, ids.eos]
    und, text = TokenKind.image_und, TokenKind.text
    kinds = [text, text, *2 * [text, *[und] * 16, text], text, text, text, text, text]
    assert document.token_kind.tolist() == kinds
    n = len(document.input_ids)
    assert document.labels.tolist() == [0] * (n - 4) + [80, 81, ids.eos, 0]
    assert document.label_head.tolist() == [0] * (n - 4) + [LabelHead.text] * 3 + [0]
    assert [int(image.max()) for image in document.images] == [2, 1]


def test_interleaved_document_trains_texts_but_no_image_token(builder):
    image = np.zeros((3, 16, 16), np.uint8)
    segments = (Segment(int32([50])), Segment(image=0), Segment(int32([51])), Segment(image=0))
    document = builder.build_document(Sample("u", segments, (image,)), TaskId.understanding)
    ids = builder.ids
    trained = np.flatnonzero(document.label_head)
    # bos predicts the first text, end-of-image the text after it, the last end-of-image predicts eos
    assert trained.tolist() == [0, 19, 38]
    assert document.labels[trained].tolist() == [50, 51, ids.eos]
    assert document.input_ids[19] == ids.end_of_image and document.input_ids[38] == ids.end_of_image


def test_eos_is_not_trained_after_a_text_without_loss(builder):
    segments = (Segment(int32([50])), Segment(int32([51]), has_loss=False))
    document = builder.build_document(Sample("u", segments), TaskId.text)
    assert document.label_head.tolist() == [LabelHead.text, 0, 0, 0]


@BOTH
@pytest.mark.parametrize("drop", [False, True])
def test_drawing_document(tokenizer, geometry, template, drop):
    builder = DialogueBuilder(tokenizer, template, geometry)
    image_ids = np.arange(40, 56, dtype=np.uint16)
    caption = int32(tokenizer.encode(caption_text("a red square")))
    document = builder.build_document(
        Sample("u", caption_ids=caption, image_ids=image_ids), TaskId.generation, drop_prompt=drop
    )
    ids, kind = document.input_ids.tolist(), document.token_kind.tolist()
    prompt = builder.generation_prompt("a red square").tolist()
    if drop:
        prompt[1:-1] = [builder.ids.pad] * (len(prompt) - 2)
        assert builder.unconditional_prompt(builder.generation_prompt("a red square")).tolist() == prompt
    assert ids == [*prompt, *range(40, 56), builder.ids.end_of_image]
    assert kind == [TokenKind.text] * len(prompt) + [TokenKind.image_gen] * 16 + [TokenKind.text]
    assert document.labels.tolist() == [0] * (len(prompt) - 1) + list(range(40, 56)) + [0, 0]
    assert document.label_head.tolist() == [0] * (len(prompt) - 1) + [LabelHead.image] * 16 + [0, 0]


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_tokenizer_that_merges_over_turns_is_refused(tmp_path, geometry):
    """A dummy prefix puts a space before every piece: pieces and whole strings differ."""
    from sentencepiece import sentencepiece_model_pb2

    from data_pipeline.text.load import load_text_tokenizer

    path = train_tokenizer(tmp_path).path
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = True
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=r"text\.model: the tokenizer merges text across the turns"):
        DialogueBuilder(load_text_tokenizer(path), Template.deepseek_old, geometry)


def test_lengths_follow_the_geometry(tokenizer):
    small = DialogueBuilder(tokenizer, Template.deepseek, ImageGeometry(understanding_tokens=4, generation_tokens=9))
    image = np.zeros((3, 384, 384), np.uint8)
    assert len(small.build_document(Sample("u", (Segment(image=0),), (image,)), 1).input_ids) == 1 + 6 + 1
