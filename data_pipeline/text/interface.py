"""What the project asks of a text tokenizer: strings to ids and back, special tokens by string, a digest.

Two rules hold for every tokenizer behind this interface: `encode` never produces a special token, whatever characters
the text contains, and `decode` never shows one. Only `encode_with_special` maps the strings of special tokens to their
ids; it treats a whole prompt string exactly as a Hugging Face processor does.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.text.special import split_as_plain, split_at_special


class TextTokenizer(ABC):
    """A text tokenizer; subclasses say how plain pieces are encoded and decoded."""

    def __init__(self, path: Path, digest: str, special_ids: frozenset[int]) -> None:
        self.path = path
        """The file that alone rebuilds this tokenizer (a .model or a tokenizer.json)."""
        self.digest = digest
        """sha256 of that file, hex; shards remember it."""
        self._special_ids = special_ids

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids; every id is smaller."""

    @abstractmethod
    def find(self, token: str) -> int | None:
        """Returns the id of a token given by its string, or None where the vocabulary lacks it."""

    @abstractmethod
    def _encode_plain(self, text: str) -> list[int]:
        """Encodes a text in which no special token's string occurs."""

    @abstractmethod
    def _decode_plain(self, ids: list[int]) -> str:
        """Decodes ids among which no special token is."""

    def id_of(self, token: str) -> int:
        """Returns the id of a special token.

        Raises:
            UserError: The vocabulary lacks it.
        """
        found = self.find(token)
        if found is None:
            raise UserError(
                f"{self.path}: the tokenizer has no token {token!r}, which Janus needs; "
                "train one with `janus-mega tokenizer train-text` or add the token to its vocabulary"
            )
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a text as plain text: no bos, no eos, no special token even where its string occurs."""
        ids: list[int] = []
        for piece in split_as_plain(text):
            ids += self._encode_plain(piece)
        return ids

    def encode_with_special(self, text: str) -> list[int]:
        """Ids of a prompt string in which the strings of special tokens mean those tokens; no bos, no eos is added.

        Raises:
            UserError: A special token that occurs is not in the vocabulary.
        """
        ids: list[int] = []
        for piece, is_special in split_at_special(text):
            ids += [self.id_of(piece)] if is_special else self._encode_plain(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out. `decode(encode(x)) == x` where the vocabulary is lossless."""
        return self._decode_plain([int(i) for i in ids if int(i) not in self._special_ids])
