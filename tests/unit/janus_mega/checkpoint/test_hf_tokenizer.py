"""The Hugging Face twin of the text tokenizer: equal ids on prose, code, runs, unicode and special tokens."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_pipeline.errors import UserError
from data_pipeline.text import special
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.text.load import load_text_tokenizer
from data_pipeline.text.train import train_sentencepiece
from janus_mega.checkpoint.hf import tokenizer as hf_tokenizer
from janus_mega.checkpoint.hf.tokenizer import build_hf_tokenizer

SOURCES = sorted(Path(__file__).resolve().parent.glob("*.py"))
PARTS = (*"ab se ti\n\t=-#_.\"'0123é漢🙂<>|\u00a0\u0000", "    ", "----", "<0x0A>", "<unk>", *special.SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """Trained on the tests beside this one: prose, code, indentation."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for number, path in enumerate(SOURCES):
        (folder / f"{number}.txt").write_text(path.read_text())
    return train_sentencepiece([folder], 768, folder / "tokenizer.model")


def corpus() -> list[str]:
    chooser = random.Random(0)
    texts = [path.read_text() for path in SOURCES]
    for _ in range(3000):
        texts.append("".join(chooser.choice(PARTS) * chooser.choice((1, 1, 2, 5, 13)) for _ in range(8)))
    for _ in range(1000):
        text = chooser.choice(texts[: len(SOURCES)])
        start = chooser.randrange(len(text))
        texts.append(text[start : start + chooser.randrange(1, 120)])
    return texts


def mismatches(ours: TextTokenizer, theirs: Tokenizer) -> int:
    return sum(ours.encode_with_special(text) != theirs.encode(text, add_special_tokens=False).ids for text in corpus())


def test_ids_and_decoded_text_are_equal(tokenizer: TextTokenizer) -> None:
    twin = build_hf_tokenizer(tokenizer)
    assert mismatches(tokenizer, twin) == 0
    for text in corpus()[:200]:
        ids = tokenizer.encode_with_special(text)
        assert twin.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_a_wrong_order_of_merges_is_noticed(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    merges = hf_tokenizer._merges
    monkeypatch.setattr(hf_tokenizer, "_merges", lambda model, vocab: merges(model, vocab)[::-1])
    monkeypatch.setattr(hf_tokenizer, "_PROBES", ())
    assert mismatches(tokenizer, build_hf_tokenizer(tokenizer)) > 500
    monkeypatch.undo()
    monkeypatch.setattr(hf_tokenizer, "_merges", lambda model, vocab: merges(model, vocab)[::-1])
    with pytest.raises(UserError, match="tokenizes .* differently"):
        build_hf_tokenizer(tokenizer)


def test_exported_tokenizer_prepends_bos_and_knows_the_named_tokens(export: Path, checkpoint: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(export, local_files_only=True)
    ours = load_text_tokenizer(checkpoint / "text_tokenizer")
    prompt = f"{special.USER}: a  small\npicture\n\n{special.ASSISTANT}:"
    assert loaded(prompt)["input_ids"] == [ours.id_of(special.BOS), *ours.encode_with_special(prompt)]
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == special.CONTROL_TOKENS
    assert (loaded.image_token, loaded.boi_token) == (special.IMAGE_PLACEHOLDER, special.BEGIN_OF_IMAGE)
    assert loaded.eoi_token == special.END_OF_IMAGE
    padded = loaded([prompt, "x"], padding=True)["input_ids"][1]
    assert padded[0] == ours.id_of(special.PAD)  # on the left


def test_a_tokenizer_json_passes_through(export: Path, tmp_path: Path) -> None:
    copied = tmp_path / "tokenizer.json"
    copied.write_bytes((export / "tokenizer.json").read_bytes())
    again = build_hf_tokenizer(load_text_tokenizer(copied))
    assert again.to_str() == Tokenizer.from_file(str(copied)).to_str()


def test_models_that_do_not_convert_exactly_are_refused(tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "text.txt").write_text(SOURCES[0].read_text())
    sentencepiece.SentencePieceTrainer.Train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "unigram"),
        model_type="unigram",
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="only sentencepiece BPE"):
        build_hf_tokenizer(load_text_tokenizer(tmp_path / "unigram.model"))
