"""Documents made by hand, with every kind of position."""

import numpy as np

from data_pipeline.schema import Document, LabelHead, TaskId, TokenKind

SIDE = 4


def text_document(random, length):
    ids = random.integers(10, 90, length).astype(np.int32)
    labels = np.append(ids[1:], 0).astype(np.int32)
    head = np.full(length, LabelHead.text, np.uint8)
    head[-1] = LabelHead.none
    return Document(ids, np.zeros(length, np.uint8), labels, head, TaskId.text)


def picture_document(random, num_images=1, num_words=3, tokens=4):
    """bos, images as boi + placeholders + eoi (ids 3, 4, 5), trained words, eos (2)."""
    block = [3] + [4] * tokens + [5]
    words = random.integers(10, 90, num_words).tolist()
    ids = np.array([1, *block * num_images, *words, 2], np.int32)
    kind = np.where(ids == 4, TokenKind.image_und, TokenKind.text).astype(np.uint8)
    first = len(ids) - num_words - 2
    labels, head = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.uint8)
    labels[first:-1], head[first:-1] = ids[first + 1 :], LabelHead.text
    images = tuple(random.integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8) for _ in range(num_images))
    return Document(ids, kind, labels, head, TaskId.understanding, images)


def drawing_document(random, tokens=4):
    """bos, a word, boi, image ids, eoi; only the image ids are predicted."""
    image_ids = random.integers(0, 16, tokens).tolist()
    ids = np.array([1, int(random.integers(10, 90)), 3, *image_ids, 5], np.int32)
    kind = np.zeros(len(ids), np.uint8)
    kind[3:-1] = TokenKind.image_gen
    labels, head = np.zeros(len(ids), np.int32), np.zeros(len(ids), np.uint8)
    labels[2:-2], head[2:-2] = image_ids, LabelHead.image
    return Document(ids, kind, labels, head, TaskId.generation)
