"""A Hugging Face tokenizer with the ids of our text tokenizer.

A sentencepiece BPE model says of each piece only its priority; the tokenizers library wants pairs to merge. Every cut
of a piece into two pieces becomes a merge of that piece's priority. Typed special tokens become added tokens, so a
prompt string is tokenized as `encode_with_special` does, and bos is put in front as Janus's processors expect.

Known to differ: a text with U+2581, which stands for the space inside the model, and invalid surrogates.
"""

import json
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from data_pipeline.errors import UserError
from data_pipeline.text import special
from data_pipeline.text.interface import TextTokenizer

_BPE = 2
"""`trainer_spec.model_type` of a BPE model."""
_NORMAL = 1
"""Type of an ordinary piece; others (control, user-defined, byte, unknown) are never merged."""
_SPACE_MARK = "▁"


def build_hf_tokenizer(tokenizer: TextTokenizer) -> Tokenizer:
    """The tokenizers-library twin of a text tokenizer; ids are equal by construction and checked on a sample.

    Raises:
        UserError: the sentencepiece model is not one that converts exactly.
    """
    if tokenizer.path.suffix == ".json":
        return Tokenizer.from_buffer(tokenizer.path.read_bytes())
    built = _from_sentencepiece(tokenizer.path)
    tokens = [token for token in special.SPECIAL_TOKENS if tokenizer.find(token) is not None]
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    bos = special.BOS
    built.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.id_of(bos))]
    )
    for text in _PROBES:
        if built.encode(text, add_special_tokens=False).ids != tokenizer.encode_with_special(text):
            raise UserError(
                f"{tokenizer.path}: the Hugging Face twin tokenizes {text!r} differently; give a tokenizer.json"
            )
    return built


_PROBES = (
    "a  line\n\twith   spaces \n\n and 1234567890",
    f"{special.USER}: draw é 漢字 🙂\n\n{special.ASSISTANT}:{special.BEGIN_OF_IMAGE}",
    " " * 37 + "x" + "=" * 41 + "-" * 19,
)


def _from_sentencepiece(path: Path) -> Tokenizer:
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when imported
    model.ParseFromString(path.read_bytes())
    rules = model.normalizer_spec
    if model.trainer_spec.model_type != _BPE or rules.name != "identity" or rules.add_dummy_prefix:
        raise UserError(
            f"{path}: only sentencepiece BPE models with identity normalisation and without dummy prefix convert "
            "exactly; train one with `janus-mega tokenizer train-text` or give a tokenizer.json"
        )
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    unknown = model.pieces[model.trainer_spec.unk_id].piece
    bpe = BPE(
        vocab=vocab,
        merges=_merges(model, vocab),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
    )
    built = Tokenizer(bpe)
    built.normalizer = normalizers.Replace(" ", _SPACE_MARK)
    built.decoder = decoders.Sequence([decoders.Replace(_SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    return built


def _merges(model: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two mergeable pieces into a third, by the third's priority; longer left halves first."""
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    ranked = []
    for piece, score in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ranked.append((-score, vocab[piece], -cut, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def tokenizer_config(max_positions: int) -> dict[str, Any]:
    """Content of tokenizer_config.json.

    The named tokens stand in a dictionary: transformers 5 writes a list there, which version 4 cannot read.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "JanusProcessor",
        "bos_token": special.BOS,
        "eos_token": special.EOS,
        "pad_token": special.PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
        "padding_side": "left",
        "extra_special_tokens": {
            "image_token": special.IMAGE_PLACEHOLDER,
            "boi_token": special.BEGIN_OF_IMAGE,
            "eoi_token": special.END_OF_IMAGE,
        },
    }


def tokenizer_json(tokenizer: TextTokenizer) -> bytes:
    """Content of tokenizer.json."""
    return json.dumps(json.loads(build_hf_tokenizer(tokenizer).to_str()), ensure_ascii=False).encode()
