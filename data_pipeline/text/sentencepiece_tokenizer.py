"""A sentencepiece model as a `TextTokenizer`.

Sentencepiece writes a space as U+2581, so that character itself would come back as a space. Models with byte fallback
have ids for its three bytes; they are used, which makes the round trip exact for every text. This is the one text for
which a Hugging Face tokenizer converted from the model gives other ids.
"""

import hashlib
from pathlib import Path

import sentencepiece

from data_pipeline.errors import UserError
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.text.special import SPECIAL_TOKENS

_SPACE_MARK = "▁"


class SentencePieceTokenizer(TextTokenizer):
    """Encodes with a sentencepiece model file."""

    def __init__(self, path: Path) -> None:
        """Loads the model.

        Raises:
            UserError: The file is missing or no sentencepiece model.
        """
        try:
            model = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{path}: cannot read the tokenizer ({error.strerror}); give a .model file or a directory with "
                "tokenizer.json"
            ) from error
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(
                f"{path}: not a sentencepiece model; train one with `janus-mega tokenizer train-text`"
            ) from error
        ids = {self._processor.PieceToId(token) for token in SPECIAL_TOKENS}
        ids |= {i for i in range(self._processor.GetPieceSize()) if self._processor.IsControl(i)}
        super().__init__(path, hashlib.sha256(model).hexdigest(), frozenset(ids - {self._processor.unk_id()}))
        mark_bytes = [self.find(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark_ids = [i for i in mark_bytes if i is not None]

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.GetPieceSize()

    @property
    def model_bytes(self) -> bytes:
        """The serialized model, for converters."""
        return self._processor.serialized_model_proto()

    def find(self, token: str) -> int | None:
        """Returns the id of a piece, or None."""
        found = self._processor.PieceToId(token)
        return None if found == self._processor.unk_id() else found

    def _encode_plain(self, text: str) -> list[int]:
        if _SPACE_MARK not in text or not self._mark_ids:
            return self._processor.Encode(text)
        first, *rest = text.split(_SPACE_MARK)
        ids = self._processor.Encode(first)
        for piece in rest:
            ids += self._mark_ids + self._processor.Encode(piece)
        return ids

    def _decode_plain(self, ids: list[int]) -> str:
        return self._processor.Decode(ids)
