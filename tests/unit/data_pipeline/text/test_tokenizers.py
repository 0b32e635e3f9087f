"""Both kinds of tokenizers behind the interface."""

import pickle
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from data_pipeline.errors import UserError
from data_pipeline.text.load import load_text_tokenizer
from data_pipeline.text.special import BOS, EOS, IMAGE_PLACEHOLDER, PAD, SPECIAL_TOKENS, USER
from tests.support.raw import PROSE


@pytest.fixture(scope="session")
def huggingface(tmp_path_factory):
    """A byte-level BPE with newlines alone, as DeepSeek's tokenizers have them."""
    built = Tokenizer(BPE())
    newlines = pre_tokenizers.Split("\n", "isolated")
    built.pre_tokenizer = pre_tokenizers.Sequence([newlines, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    built.train_from_iterator(
        PROSE, BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    )
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    built.save(str(path))
    return load_text_tokenizer(path.parent)


@pytest.fixture(params=["sentencepiece", "huggingface"])
def any_tokenizer(request, tokenizer):
    return tokenizer if request.param == "sentencepiece" else request.getfixturevalue("huggingface")


def texts():
    yield from PROSE
    yield from [
        "",
        " ",
        "  lead",
        "trail  ",
        "a\n\n\n b\r\n\t",
        "é漢😀\u2028\u3000\ufeff",
        "\0",
        "▁",
        "a▁b ▁▁",
        "<0x0A>",
        "<unk>",
    ]
    yield from SPECIAL_TOKENS
    rng = random.Random(0)
    ranges = [(1, 128), (1, 0x800), (0x800, 0xD800), (0xE000, 0x110000), (0x2580, 0x2584)]
    for _ in range(300):
        yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(40)))


def test_every_text_survives_the_round_trip(any_tokenizer):
    special = {any_tokenizer.id_of(token) for token in SPECIAL_TOKENS}
    for text in texts():
        ids = any_tokenizer.encode(text)
        assert any_tokenizer.decode(ids) == text
        assert not special & set(ids), text
        assert all(0 <= i < any_tokenizer.vocab_size for i in ids)


def test_special_tokens_are_found_by_string_and_typed_on_demand(any_tokenizer):
    ids = [any_tokenizer.id_of(token) for token in SPECIAL_TOKENS]
    assert len(set(ids)) == len(SPECIAL_TOKENS)
    text = f"{USER}: a{IMAGE_PLACEHOLDER}\nb{PAD}"
    expected = [any_tokenizer.id_of(USER), *any_tokenizer.encode(": a"), any_tokenizer.id_of(IMAGE_PLACEHOLDER)]
    expected += [*any_tokenizer.encode("\nb"), any_tokenizer.id_of(PAD)]
    assert any_tokenizer.encode_with_special(text) == expected
    assert any_tokenizer.decode([any_tokenizer.id_of(BOS), *expected, any_tokenizer.id_of(EOS)]) == ": a\nb"


def test_the_bare_sentencepiece_model_agrees_on_whole_prompt_strings(tokenizer):
    import sentencepiece

    bare = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    prompt = "<|User|>: <begin_of_image><image_placeholder><end_of_image>\nWhich  colour?\n\n<|Assistant|>: red"
    assert bare.encode(prompt) == tokenizer.encode_with_special(prompt)


def test_a_missing_special_token_is_named(tmp_path):
    built = Tokenizer(BPE(vocab={"a": 0}, merges=[]))
    built.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer\.json.*<image_placeholder>.*train-text"):
        load_text_tokenizer(tmp_path).id_of(IMAGE_PLACEHOLDER)


@pytest.mark.parametrize("name", ["text.model", "tokenizer.json"])
def test_damaged_or_missing_files_are_named(tmp_path, name):
    with pytest.raises(UserError, match=name):
        load_text_tokenizer(tmp_path / name)
    (tmp_path / name).write_bytes(b"no tokenizer")
    with pytest.raises(UserError, match=name):
        load_text_tokenizer(tmp_path / name)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor a \.model"):
        load_text_tokenizer(tmp_path)


def test_digests_tell_tokenizers_apart_and_pickles_keep_them(any_tokenizer, tokenizer, huggingface):
    assert tokenizer.digest != huggingface.digest and len(tokenizer.digest) == 64
    copy = pickle.loads(pickle.dumps(any_tokenizer))
    assert copy.digest == any_tokenizer.digest and copy.encode(PROSE[0]) == any_tokenizer.encode(PROSE[0])
