"""The special tokens of Janus, by their exact strings, and how strings are split at them.

Ids differ between published tokenizers, so the project knows special tokens by string only and asks the tokenizer for
ids. Plain text never becomes a special token: a corpus may well contain the characters `<image_placeholder>`, and
letting them through would shift every image that follows.
"""

import re

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
IMAGE_PLACEHOLDER = "<image_placeholder>"
BEGIN_OF_IMAGE = "<begin_of_image>"
END_OF_IMAGE = "<end_of_image>"
USER = "<|User|>"
ASSISTANT = "<|Assistant|>"

CONTROL_TOKENS = (BOS, EOS, PAD)
"""Tokens that stand around documents; they are written by id and never typed."""

TYPED_TOKENS = (
    IMAGE_PLACEHOLDER,
    BEGIN_OF_IMAGE,
    END_OF_IMAGE,
    USER,
    ASSISTANT,
    "<patch_placeholder>",
    "<|ref|>",
    "<|/ref|>",
    "<|det|>",
    "<|/det|>",
    "<|grounding|>",
)
"""Tokens that appear inside prompt strings. The last six have no use here but keep their place in Janus-Pro's map."""

SPECIAL_TOKENS = CONTROL_TOKENS + TYPED_TOKENS

_SPECIAL = re.compile("(" + "|".join(re.escape(token) for token in sorted(SPECIAL_TOKENS, key=len, reverse=True)) + ")")


def split_at_special(text: str) -> list[tuple[str, bool]]:
    """Cuts a prompt string into (piece, is_special) pairs, empty pieces left out."""
    return [(piece, number % 2 == 1) for number, piece in enumerate(_SPECIAL.split(text)) if piece]


def split_as_plain(text: str) -> list[str]:
    """Cuts a text so that no piece contains a special token's string: each occurrence is broken after one character."""
    if _SPECIAL.search(text) is None:
        return [text] if text else []
    pieces = [""]
    for piece, is_special in split_at_special(text):
        if is_special:
            pieces[-1] += piece[0]
            pieces.append(piece[1:])
        else:
            pieces[-1] += piece
    return [piece for piece in pieces if piece]
