"""Documents of every kind for a tiny Janus, built by the rules of training."""

import numpy as np

from data_pipeline.dialogue import DialogueBuilder, answer_text, caption_text, prompt_segments, question_pieces
from data_pipeline.schema import Document, Sample, Segment, TaskId


def random_images(count: int, side: int, seed: int = 0) -> list[np.ndarray]:
    """uint8 [3, side, side] each."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def make_documents(dialogue: DialogueBuilder, seed: int = 0) -> list[Document]:
    """A text, a question with two images, an interleaved document, a drawing and one with its prompt dropped."""
    rng = np.random.default_rng(seed)
    geometry, encode = dialogue.geometry, dialogue.tokenizer.encode
    images = random_images(3, geometry.understanding_size, seed)

    def text(content: str, has_loss: bool = True) -> Segment:
        return Segment(np.array(encode(content), np.int32), has_loss=has_loss)

    question = prompt_segments(dialogue.tokenizer, question_pieces(dialogue.template, "What do you see?", 2))
    drawing = Sample(
        uid="t2i:0",
        caption_ids=np.array(encode(caption_text("a red square")), np.int32),
        image_ids=rng.integers(0, geometry.codebook_size, geometry.generation_tokens).astype(np.uint16),
    )
    return [
        dialogue.build_document(Sample("text:0", (text("The quick brown fox jumps."),)), TaskId.text),
        dialogue.build_document(
            Sample("interleaved:0", (*question, text(answer_text("a fox"))), tuple(images[:2])), TaskId.understanding
        ),
        dialogue.build_document(
            Sample("interleaved:1", (Segment(image=0), text(" is a circle\n")), (images[2],)), TaskId.understanding
        ),
        dialogue.build_document(drawing, TaskId.generation),
        dialogue.build_document(drawing, TaskId.generation, drop_prompt=True),
    ]
