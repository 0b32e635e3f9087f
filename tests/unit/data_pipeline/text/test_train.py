"""Training of the text tokenizer."""

import pytest

from data_pipeline.errors import UserError
from data_pipeline.text.special import SPECIAL_TOKENS
from data_pipeline.text.train import train_sentencepiece
from tests.support.raw import PROSE, write_jsonl


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("\n".join(PROSE), encoding="utf-8")
    return path


def test_the_same_text_gives_the_same_bytes_wherever_it_lies(tmp_path, prose):
    first = train_sentencepiece([prose], 340, tmp_path / "a.model")
    (tmp_path / "moved").mkdir()
    moved = prose.rename(tmp_path / "moved" / "other.txt")
    second = train_sentencepiece([moved], 340, tmp_path / "deep" / "b.model", num_threads=2)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "deep" / "b.model").read_bytes()
    assert first.digest == second.digest
    assert first.vocab_size == 340


def test_newlines_digits_and_special_tokens_stand_alone(tmp_path, prose):
    tokenizer = train_sentencepiece([prose], 340, tmp_path / "a.model")
    newline = tokenizer.encode("\n")
    assert len(newline) == 1
    assert tokenizer.encode("a.\n\nb") == tokenizer.encode("a.") + newline * 2 + tokenizer.encode("b")
    assert tokenizer.encode("314") == [i for digit in "314" for i in tokenizer.encode(digit)]
    assert all(tokenizer.find(token) is not None for token in SPECIAL_TOKENS)


def test_records_of_every_kind_are_learnt_from(tmp_path):
    records = [
        {"question": "zzz qqq", "answer": "xxx", "image": "no.png"},
        {"segments": [{"image": "no.png"}, {"text": "vvv www"}]},
        {"captions": ["kkk jjj", "uuu"], "image": "no.png"},
    ]
    path = write_jsonl(tmp_path / "records.jsonl", records * 5)
    tokenizer = train_sentencepiece([path], 300, tmp_path / "a.model")
    for word in ("zzz", "xxx", "www", "jjj", "uuu"):
        assert len(tokenizer.encode(word)) <= 2, word


@pytest.mark.parametrize("vocab_size", [100, 60_000])
def test_a_vocabulary_that_does_not_fit_the_text_is_refused(tmp_path, prose, vocab_size):
    with pytest.raises(UserError, match=rf"prose\.txt.*vocab_size {vocab_size}"):
        train_sentencepiece([prose], vocab_size, tmp_path / "a.model")
    assert not list(tmp_path.glob("*.model*"))


def test_a_broken_record_is_named_and_not_skipped(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"text": "fine enough"}\n{"text": 7}\n')
    with pytest.raises(UserError, match=r"records\.jsonl:2: 'text' must be a text"):
        train_sentencepiece([path], 300, tmp_path / "a.model")


def test_no_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"empty\.txt"):
        train_sentencepiece([tmp_path / "empty.txt"], 340, tmp_path / "a.model")
