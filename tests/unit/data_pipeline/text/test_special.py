"""Splitting strings at special tokens."""

import pytest

from data_pipeline.text import special
from data_pipeline.text.special import SPECIAL_TOKENS, split_as_plain, split_at_special


def test_prompt_strings_are_cut_at_every_special_token():
    text = "<|User|>: <image_placeholder>\nhi<|Assistant|>:"
    assert split_at_special(text) == [
        (special.USER, True),
        (": ", False),
        (special.IMAGE_PLACEHOLDER, True),
        ("\nhi", False),
        (special.ASSISTANT, True),
        (":", False),
    ]


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
@pytest.mark.parametrize("around", ["{}", "a{}b", "{0}{0}", "<{}>"])
def test_plain_pieces_never_hold_a_special_token_and_lose_nothing(token, around):
    text = around.format(token)
    pieces = split_as_plain(text)
    assert "".join(pieces) == text
    assert not any(other in piece for piece in pieces for other in SPECIAL_TOKENS)


def test_text_without_special_tokens_stays_whole():
    assert split_as_plain("a < b > c") == ["a < b > c"]
    assert split_as_plain("") == []
