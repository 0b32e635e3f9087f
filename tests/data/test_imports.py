"""Formats of others through prepare to training documents: what is learnt, what is masked, what joins, what is kept."""

import io
import json
import tarfile
import warnings

import numpy as np
import pyarrow
import pytest
import webdataset
from pyarrow import parquet

from data_pipeline.dialogue import DialogueBuilder, answer_text, question_pieces
from data_pipeline.errors import UserError
from data_pipeline.manifest import open_source
from data_pipeline.prepare.foreign import index_tars
from data_pipeline.prepare.importing import ImportOptions, OnMissingImage
from data_pipeline.prepare.interleaved import prepare_interleaved
from data_pipeline.prepare.options import OnBad, PrepareOptions
from data_pipeline.prepare.t2i import prepare_t2i
from data_pipeline.prepare.text import prepare_text
from data_pipeline.schema import TaskId
from data_pipeline.spec import ImageGeometry, Template
from data_pipeline.stream.read import SampleReader
from data_pipeline.text import special
from tests.support.raw import ColourTokenizer, picture, picture_bytes, train_tokenizer, write_jsonl

GEOMETRY = ImageGeometry(
    understanding_size=16, understanding_tokens=16, generation_size=16, generation_tokens=16, codebook_size=64
)
TEMPLATES = list(Template)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def pictures(tmp_path):
    for name, colour in (("red.png", "red"), ("blue.jpg", "blue"), ("green.webp", "green")):
        (tmp_path / name).write_bytes(picture_bytes(picture(colour, 24, 16), name.split(".")[1].replace("jpg", "jpeg")))
    return tmp_path


def options_of(**importing):
    on_bad = importing.pop("on_bad", OnBad.error)
    return PrepareOptions(on_bad=on_bad, importing=ImportOptions(**importing))


def conversation(*texts, **fields):
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"conversations": turns, **fields}


def learnt(builder, sample):
    """Ids of a document and which of them are predicted."""
    document = builder.build_document(sample, TaskId.understanding)
    ids = document.input_ids.tolist()
    where = np.flatnonzero(document.label_head) + 1
    assert [ids[at] for at in where] == document.labels[where - 1].tolist()
    return ids, where.tolist()


# ---- conversations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_only_answers_and_their_ends_are_learnt(pictures, tokenizer, template):
    """Token by token: prompts as inference feeds them, each answer followed by eos, the next turn right behind it."""
    turns = ("<image>\nWhich colour?", "It is red.", "And where?", "Everywhere.", "Sure?", "Yes.")
    row = conversation(*turns, image="red.png", system="Be brief.")
    path = write_jsonl(pictures / "a.jsonl", [row])
    prepare_interleaved([path], pictures / "out", tokenizer, template=template)
    source = open_source(pictures / "out")
    builder = DialogueBuilder(tokenizer, template, GEOMETRY)
    ids, where = learnt(builder, SampleReader(source, GEOMETRY).read(0))
    eos = tokenizer.id_of(special.EOS)
    expected = builder.question_prompt("Which colour?", 1, "Be brief.").tolist()
    learnt_ids = []
    for question, answer in (("", turns[1]), (turns[2], turns[3]), (turns[4], turns[5])):
        if question:
            expected += builder.question_prompt(question).tolist()[1:]
        answer_ids = [*tokenizer.encode(answer_text(answer)), eos]
        learnt_ids += range(len(expected), len(expected) + len(answer_ids))
        expected += answer_ids
    assert ids == expected and where == learnt_ids
    assert len(ids) == builder.document_lengths(source)[0] and source.manifest.template == template.value


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_is_tokenized_as_its_whole_string(pictures, tokenizer, template):
    """What a processor does with DeepSeek's rendering: User: q, blank line, Assistant: a, eos, User: ..."""
    path = write_jsonl(pictures / "a.jsonl", [conversation("Which colour?", "red", "Where?", "there")])
    prepare_interleaved([path], pictures / "out", tokenizer, template=template)
    sample = SampleReader(open_source(pictures / "out"), GEOMETRY).read(0)
    user, assistant = ("<|User|>", "<|Assistant|>") if template is Template.deepseek else ("User", "Assistant")
    text = f"{user}: Which colour?\n\n{assistant}: red{special.EOS}{user}: Where?\n\n{assistant}: there"
    stored = np.concatenate([segment.text_ids for segment in sample.segments]).tolist()
    assert stored == tokenizer.encode_with_special(text)


def test_one_turn_is_a_question(pictures, tokenizer):
    """The same bytes of ids as question and answer give."""
    rows = [
        conversation("Which colour?\n<image>", "red", image="red.png"),
        {"question": "Which colour?", "answer": "red", "image": "red.png"},
        conversation("Which colour?", "red", image="red.png"),
    ]
    prepare_interleaved([write_jsonl(pictures / "a.jsonl", rows)], pictures / "out", tokenizer)
    reader = SampleReader(open_source(pictures / "out"), GEOMETRY)
    builder = DialogueBuilder(tokenizer, Template.deepseek, GEOMETRY)
    first, second, third = (learnt(builder, reader.read(i)) for i in range(3))
    assert first == second == third


def test_pictures_stand_where_they_are_called(pictures, tokenizer):
    rows = [conversation("Is <image> like <image>?", "No.", "<image>\nAnd this?", "Yes.")]
    rows[0]["images"] = ["red.png", "blue.jpg", "green.webp"]
    prepare_interleaved([write_jsonl(pictures / "a.jsonl", rows)], pictures / "out", tokenizer)
    sample = SampleReader(open_source(pictures / "out"), GEOMETRY).read(0)
    shown = [s.image if s.text_ids is None else tokenizer.decode(s.text_ids) for s in sample.segments]
    assert [part for part in shown if isinstance(part, int)] == [0, 1, 2]
    at = [number for number, part in enumerate(shown) if isinstance(part, int)]
    assert shown[at[0] - 1].endswith(": Is ") and shown[at[1] - 1] == " like " and shown[at[2] + 1].startswith("\nAnd")
    assert [image.mean((1, 2)).argmax() for image in sample.images] == [0, 2, 1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (conversation("<image> a", "b"), "image_mismatch"),
        (conversation("<image> a", "b", images=["red.png", "blue.jpg"]), "image_mismatch"),
        (conversation("a", "<image> b", image="red.png"), "image_mismatch"),
        (conversation("a", "b", "c", image="gone.png"), "missing_image"),
        (conversation("a", " "), "empty_text"),
        (conversation("a"), "bad_roles"),
        ({"conversations": [{"from": "gpt", "value": "b"}]}, "bad_roles"),
        ({"conversations": [{"from": "human", "value": "a"}] * 2 + [{"from": "gpt", "value": "b"}]}, "bad_roles"),
        ({"conversation": "a"}, "bad_record"),
    ],
)
def test_conversations_that_cannot_be_rendered_are_counted(pictures, tokenizer, row, reason):
    path = write_jsonl(pictures / "a.jsonl", [row, conversation("a", "b")])
    report = prepare_interleaved([path], pictures / "out", tokenizer, options=options_of(on_bad=OnBad.skip))
    assert (report.rejects, report.num_samples) == ({reason: 1}, 1)
    with pytest.raises(UserError, match=r"a\.jsonl:1: "):
        prepare_interleaved([path], pictures / "stop", tokenizer)


# ---- documents whose pictures lie elsewhere --------------------------------------------------------------------------


def test_a_missing_picture_takes_its_document_or_itself(pictures, tokenizer):
    row = {"images": ["red.png", None, "http://gone", None], "texts": [None, "one", None, "two"]}
    path = write_jsonl(pictures / "a.jsonl", [row, {"segments": [{"text": "whole"}]}])
    report = prepare_interleaved([path], pictures / "out", tokenizer, options=options_of(on_bad=OnBad.skip))
    assert (report.rejects, report.num_samples) == ({"missing_image": 1}, 1)
    drop = options_of(on_missing_image=OnMissingImage.drop)
    report = prepare_interleaved([path], pictures / "dropped", tokenizer, options=drop)
    assert (report.rejects, report.num_samples, report.num_images) == ({"dropped_image": 1}, 2, 1)
    sample = SampleReader(open_source(pictures / "dropped"), GEOMETRY).read(0)
    texts = [s.text_ids if s.text_ids is None else tokenizer.decode(s.text_ids) for s in sample.segments]
    assert texts == [None, "one", "two"]


# ---- one picture, two shards -----------------------------------------------------------------------------------------


def write_pairs(path, count=5):
    """A tar as img2dataset writes it."""
    with tarfile.open(path, "w") as tar:
        for n in range(count):
            facts = {"uid": f"{n:032x}", "caption": f"number {n}", "aesthetic": n / 10, "language": "en"}
            content = picture_bytes(picture("red", 16 + n, 20, n))
            for extension, member in (("png", content), ("json", json.dumps(facts).encode())):
                entry = tarfile.TarInfo(f"{n:09d}.{extension}")
                entry.size = len(member)
                tar.addfile(entry, io.BytesIO(member))
    return path


def test_the_same_pictures_join_by_uid(tmp_path, tokenizer):
    tar = write_pairs(tmp_path / "00000.tar")
    index_tars([tar], tmp_path / "seen", tokenizer)
    prepare_interleaved([tar], tmp_path / "copied", tokenizer)
    prepare_t2i(
        [tar], tmp_path / "drawn", tokenizer, ColourTokenizer(), options=options_of(keep_columns=("aesthetic",))
    )
    sources = [open_source(tmp_path / name) for name in ("seen", "copied", "drawn")]
    uids = [[source.uid(i) for i in range(len(source))] for source in sources]
    assert uids[0] == uids[1] == uids[2] == [f"{n:032x}" for n in range(5)]
    seen, copied = (SampleReader(source, GEOMETRY, tokenizer) for source in sources[:2])
    builder = DialogueBuilder(tokenizer, Template.deepseek, GEOMETRY)
    for i in range(5):
        assert learnt(builder, seen.read(i)) == learnt(builder, copied.read(i))
        assert np.array_equal(seen.read(i).images[0], copied.read(i).images[0])
    meta = {path.stem: np.load(path) for path in (tmp_path / "drawn" / "index" / "meta").glob("*.npy")}
    assert meta["aesthetic"].tolist() == np.arange(5, dtype="<f4").__truediv__(10).tolist()
    assert meta["width"].tolist() == [16, 17, 18, 19, 20] and meta["caption_chars"].tolist() == [8] * 5


def test_facts_stand_in_documents_records_and_columns(pictures, tokenizer):
    rows = [
        {"image": "red.png", "caption": " a red one ", "url": "http://x", "license": "CC0", "score": 0.5, "lang": "de"},
        {"image": "blue.jpg", "captions": ["blue", "blau"], "score": "0.25", "other": 3},
        {"segments": [{"text": "no picture"}], "language": "en"},
    ]
    path = write_jsonl(pictures / "a.jsonl", rows)
    options = options_of(keep_columns=("score", "absent"))
    prepare_interleaved([path], pictures / "out", tokenizer, options=options)
    source = open_source(pictures / "out")
    columns = {file.stem: np.load(file) for file in (pictures / "out" / "index" / "meta").glob("*.npy")}
    assert sorted(columns) == ["caption_chars", "height", "language", "score", "width"]
    assert columns["score"].dtype == np.float32 and columns["language"].dtype == np.uint16
    expected = {"score": [0.5, 0.25, 0.25], "width": [24] * 3, "height": [16] * 3, "caption_chars": [9, 4, 4]}
    for name, values in expected.items():
        assert columns[name][:3].tolist() == values and np.isnan(columns[name][3])
    assert columns["language"].tolist() == [1, 0, 0, 2]
    assert json.loads((pictures / "out" / "index" / "meta" / "language.json").read_bytes())["names"] == ["", "de", "en"]
    meta = json.loads(bytes(SampleReader(source, GEOMETRY).members(0)["doc.json"]))["meta"]
    assert (meta["url"], meta["license"], meta["language"], len(meta["sha256"])) == ("http://x", "CC0", "de", 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        stock = list(webdataset.WebDataset(str(pictures / "out/shards/000000.tar"), shardshuffle=False).decode("rgb8"))
    assert [sample["doc.json"]["meta"].get("width") for sample in stock] == [24, 24, 24, None]
    text = write_jsonl(pictures / "t.jsonl", [{"text": "one two", "score": 2}, {"text": "three", "language": "fr"}])
    prepare_text([text], pictures / "text", tokenizer, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        (record,) = webdataset.WebDataset(str(pictures / "text/shards/000000.tar"), shardshuffle=False).decode()
    assert record["meta.json"] == {"v": 1, "n": 2, "columns": {"language": [None, "fr"], "score": [2.0, None]}}
    assert np.load(pictures / "text" / "index" / "meta" / "language.npy").tolist() == [0, 1]


def test_columns_are_the_same_however_shards_are_cut(tmp_path, tokenizer):
    rows = [{"text": f"text {n}", "lang": ("en", "de", "fr")[n % 3]} if n % 4 else {"text": "bare"} for n in range(30)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    for size in (4, 30):
        prepare_text([path], tmp_path / str(size), tokenizer, options=PrepareOptions(samples_per_shard=size))
    found = [np.load(tmp_path / str(size) / "index" / "meta" / "language.npy").tolist() for size in (4, 30)]
    assert found[0] == found[1] and set(found[0]) == {0, 1, 2, 3}
    with pytest.raises(UserError, match="--keep '../x' must be the name"):
        prepare_text([path], tmp_path / "bad", tokenizer, options=options_of(keep_columns=("../x",)))


def test_parquet_to_all_kinds(tmp_path, tokenizer):
    count = 7
    columns = {
        "image": [{"bytes": picture_bytes(picture("blue", 16, 16, n)), "path": None} for n in range(count)],
        "caption": [f"blue {n}" for n in range(count)],
        "text": [f"words {n}" for n in range(count)],
        "uid": [f"{n:032x}" for n in range(count)],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet", row_group_size=3)
    inputs, images = [tmp_path / "a.parquet"], ColourTokenizer()
    options = PrepareOptions(samples_per_shard=2, encode_batch_size=3, importing=ImportOptions(text_column="text"))
    assert prepare_text(inputs, tmp_path / "text", tokenizer, options=options).num_samples == count
    options = PrepareOptions(samples_per_shard=2, encode_batch_size=3)
    assert prepare_t2i(inputs, tmp_path / "t2i", tokenizer, images, options=options).num_samples == count
    assert prepare_interleaved(inputs, tmp_path / "pairs", tokenizer, options=options).num_samples == count
    sources = [open_source(tmp_path / name) for name in ("text", "t2i", "pairs")]
    assert all([source.uid(i) for i in range(count)] == columns["uid"] for source in sources)
    sample = SampleReader(sources[2], GEOMETRY).read(6)
    assert tokenizer.decode(sample.segments[1].text_ids) == "blue 6" and sample.segments[1].has_loss


def test_question_pieces_are_what_they_were(tokenizer):
    """The prompt that inference and export share, piece by piece."""
    texts = [piece.text for piece in question_pieces(Template.deepseek, " q ", 2, " s ")]
    placeholder = special.IMAGE_PLACEHOLDER
    expected = ["s\n\n", "<|User|>", ": ", placeholder, "\n", placeholder, "\nq\n\n", "<|Assistant|>", ":"]
    assert texts == expected
    assert [piece.text for piece in question_pieces(Template.deepseek_old, "q")] == ["User: q\n\nAssistant:"]
