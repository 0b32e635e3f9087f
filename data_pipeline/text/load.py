"""Opens whichever text tokenizer a path holds."""

from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.text.huggingface_tokenizer import HuggingFaceTokenizer
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.text.sentencepiece_tokenizer import SentencePieceTokenizer


def load_text_tokenizer(path: str | Path) -> TextTokenizer:
    """Returns the tokenizer of a sentencepiece .model file, of a tokenizer.json, or of a directory with one of them.

    Raises:
        UserError: Nothing of the kind is there, or it does not load.
    """
    path = Path(path)
    if path.is_dir():
        candidates = [path / "tokenizer.json", *sorted(path.glob("*.model"))]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise UserError(f"{path}: the directory holds neither tokenizer.json nor a .model file; give one of them")
        path = found[0]
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path)
