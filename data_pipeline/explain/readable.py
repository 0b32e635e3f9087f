"""Token ids as people read them: stretches of text, special tokens as such, and which of it is trained on.

Labels are shifted (position i predicts token i + 1), so a token counts as trained where the position before it has a
label. Ids of images are not text; they are left to whoever shows pictures.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.schema import LabelHead, TokenKind
from data_pipeline.text import special
from data_pipeline.text.interface import TextTokenizer


@dataclass(frozen=True, slots=True)
class TextSpan:
    """A stretch of one kind."""

    text: str
    is_trained: bool = False
    """Whether the model is asked to predict it."""
    is_special: bool = False
    """Whether it is the name of a special token."""


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """One image, understood or drawn."""

    kind: TokenKind
    start: int
    """First of its positions."""
    stop: int


class TokenReader:
    """Turns ids into spans for one tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        names = {name: tokenizer.find(name) for name in special.SPECIAL_TOKENS}
        self._names = {token: name for name, token in names.items() if token is not None}

    def text(self, ids: np.ndarray) -> str:
        """Ids as text; special tokens are left out."""
        return self._tokenizer.decode(ids.tolist())

    def spans(self, ids: np.ndarray, kind: np.ndarray, label_head: np.ndarray) -> Iterator[TextSpan | ImageSpan]:
        """Spans of one document, in order; all arrays have its length."""
        trained = np.zeros(len(ids), bool)
        trained[1:] = label_head[:-1] != LabelHead.none
        is_special = np.isin(ids, list(self._names)) & (kind != TokenKind.image_gen)
        state = kind.astype(np.int64) * 4 + trained * 2 + is_special
        state[kind == TokenKind.image_und] = TokenKind.image_und * 4
        state[kind == TokenKind.image_gen] = TokenKind.image_gen * 4
        borders = [0, *(np.flatnonzero(np.diff(state)) + 1).tolist(), len(ids)]
        for start, stop in itertools.pairwise(borders):
            if kind[start] in (TokenKind.image_und, TokenKind.image_gen):
                yield ImageSpan(TokenKind(int(kind[start])), start, stop)
            elif is_special[start]:
                yield from self._special(ids[start:stop], bool(trained[start]))
            else:
                yield TextSpan(self.text(ids[start:stop]), bool(trained[start]))

    def _special(self, ids: np.ndarray, is_trained: bool) -> Iterator[TextSpan]:
        """Names of special tokens; runs of one are counted."""
        borders = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
        for start, stop in itertools.pairwise(borders):
            name = self._names[int(ids[start])]
            yield TextSpan(f"{name} x {stop - start}" if stop - start > 1 else name, is_trained, is_special=True)
