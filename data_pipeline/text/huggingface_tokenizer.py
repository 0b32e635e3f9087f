"""A Hugging Face tokenizer.json as a `TextTokenizer`, read with the tokenizers library alone.

Its post-processor (which adds bos) is not used: documents get bos and eos from the dialogue rules.
"""

import hashlib
from pathlib import Path

from tokenizers import Tokenizer

from data_pipeline.errors import UserError
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.text.special import SPECIAL_TOKENS


class HuggingFaceTokenizer(TextTokenizer):
    """Encodes with a tokenizer.json."""

    def __init__(self, path: Path) -> None:
        """Loads the file.

        Raises:
            UserError: The file is missing or not a tokenizer.json.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot read the tokenizer ({error.strerror}); give a tokenizer.json") from error
        try:
            self._tokenizer = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare exceptions on malformed files
            raise UserError(f"{path}: not a tokenizer.json that the tokenizers library reads ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        ids |= {i for i in map(self._tokenizer.token_to_id, SPECIAL_TOKENS) if i is not None}
        super().__init__(path, hashlib.sha256(content).hexdigest(), frozenset(ids))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def find(self, token: str) -> int | None:
        """Returns the id of a token, or None."""
        return self._tokenizer.token_to_id(token)

    def _encode_plain(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _decode_plain(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
