"""Trains the sentencepiece tokenizer of a project: lossless, deterministic, with every special token of Janus.

BPE with byte fallback, identity normalisation and no dummy prefix: any text survives the round trip, pieces can be
tokenized one by one, and the model converts to a Hugging Face tokenizer with equal ids. Lines are trained on without
their newline, so a newline is always a token of its own (its byte): the borders of prompt templates fall on it.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data_pipeline.errors import UserError
from data_pipeline.files import write_aside
from data_pipeline.prepare.records import read_texts
from data_pipeline.text.sentencepiece_tokenizer import SentencePieceTokenizer
from data_pipeline.text.special import BOS, EOS, PAD, TYPED_TOKENS

_MAX_LINE_BYTES = 1 << 20


def train_sentencepiece(
    inputs: Iterable[str | Path],
    vocab_size: int,
    out: str | Path,
    *,
    character_coverage: float = 0.9995,
    num_threads: int = 1,
) -> SentencePieceTokenizer:
    """Trains on text files and JSON lines (every string under text, caption(s), question, answer, segments).

    The result is the same bytes for the same texts in the same order.

    Args:
        inputs: Files or directories, as `prepare_text` takes them.
        vocab_size: Pieces in all, special tokens and the 256 bytes included.
        out: Path of the .model file to write.
        character_coverage: Share of the characters that get a piece of their own; the rest is spelled in bytes.
        num_threads: Threads of the trainer; the result does not depend on it.

    Raises:
        UserError: No text, or a vocabulary that the text cannot fill or that is too small for the characters.
    """
    out = Path(out)
    files = [Path(path) for path in inputs]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_lines(files),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=list(TYPED_TOKENS),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            bos_piece=BOS,
            eos_piece=EOS,
            pad_piece=PAD,
            max_sentence_length=_MAX_LINE_BYTES,
            num_threads=num_threads,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rsplit("]", 1)[-1].strip() or "no text was found"
        names = ", ".join(str(path) for path in files)
        raise UserError(
            f"{names}: sentencepiece cannot train vocab_size {vocab_size} on this text ({reason}); "
            "change vocab_size or give more text"
        ) from error
    out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(out, _without_threads(model.getvalue()))
    return SentencePieceTokenizer(out)


def _without_threads(model: bytes) -> bytes:
    """The model with the one setting reset that says how it was trained and not what it is."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    proto.trainer_spec.ClearField("num_threads")
    return proto.SerializeToString(deterministic=True)


def _lines(inputs: list[Path]) -> Iterator[str]:
    """Non-empty lines of all texts; a longer line than the trainer takes is cut, not dropped."""
    for text in read_texts(inputs):
        for line in text.split("\n"):
            for start in range(0, len(line), _MAX_LINE_BYTES // 4):
                yield line[start : start + _MAX_LINE_BYTES // 4]
