"""Pictures with captions beside them, in class folders and in tars; pictures that records only name."""

import hashlib
import io
import json
import pickle
import tarfile

import pyarrow
import pytest
from pyarrow import parquet

from data_pipeline.errors import UserError
from data_pipeline.prepare.importing import Format, ImportOptions
from data_pipeline.prepare.records import Reject, open_records
from tests.support.raw import picture, picture_bytes

RED, BLUE, GREEN = (picture_bytes(picture(colour)) for colour in ("red", "blue", "green"))


def put(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def records_of(path, **options):
    source = open_records([path], ImportOptions(**options))
    return list(source.read(0, source.count()))


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_captions_beside_pictures(tmp_path):
    put(tmp_path, {"b.png": RED, "b.txt": "red one", "a/z.JPEG": BLUE, "a/z.txt": "blue", "c.webp": GREEN})
    first, second, third = records_of(tmp_path)
    assert first.fields() == {"image": "a/z.JPEG", "caption": "blue"} and first.picture("a/z.JPEG") == BLUE
    assert second.fields() == {"image": "b.png", "caption": "red one"} and second.identity({}) == "b.png"
    with pytest.raises(Reject, match=r"c\.txt cannot be read") as caught:
        third.fields()
    assert caught.value.reason == "no_caption"
    names = [path.name for path in open_records([tmp_path]).files()]
    assert names == ["z.JPEG", "b.png", "c.webp", "z.txt", "b.txt"]


def test_class_folders_name_their_pictures(tmp_path):
    raw = put(tmp_path / "raw", {"n01/a.jpg": RED, "n01/b.jpg": RED, "deep/great_grey_owl/c.jpg": BLUE})
    captions = [record.fields()["caption"] for record in records_of(raw)]
    assert captions == ["great grey owl", "n01", "n01"]
    lines = put(tmp_path, {"names.txt": "n01 tench, Tinca tinca\nn02 goldfish\n"}) / "names.txt"
    assert records_of(raw, class_names=lines)[1].fields()["caption"] == "tench"
    (tmp_path / "names.json").write_text('{"n01": "a tench"}')
    assert records_of(raw, class_names=tmp_path / "names.json")[1].fields()["caption"] == "a tench"
    (tmp_path / "names.json").write_text('{"n01": 3}')
    with pytest.raises(UserError, match=r"names\.json: no names of class folders"):
        records_of(raw, class_names=tmp_path / "names.json")


def test_a_picture_without_any_caption_stops(tmp_path):
    put(tmp_path, {"a.jpg": RED, "owl/b.jpg": RED})
    with pytest.raises(UserError, match=r"'a\.jpg' has no caption"):
        records_of(tmp_path)


def test_metadata_of_hugging_face_folders(tmp_path):
    line = json.dumps({"file_name": "train/0001.png", "text": "a red square"})
    put(tmp_path, {"metadata.jsonl": line, "train/0001.png": RED, "train/0001.txt": "not this"})
    (record,) = records_of(tmp_path)
    assert record.fields() == {"image": "train/0001.png", "caption": "a red square"}
    assert record.picture("train/0001.png") == RED


# ---- tars ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def img2dataset(tmp_path):
    """What img2dataset leaves: a tar, a .parquet and a _stats.json each; the second without .json members."""
    raw = tmp_path / "raw"
    raw.mkdir()
    facts = {"url": "http://x/0", "key": "000000000", "status": "success", "width": 16, "sha256": "ab" * 32}
    write_tar(
        raw / "00000.tar",
        {
            "000000000.jpg": RED,
            "000000000.json": json.dumps(facts | {"caption": "in json"}),
            "000000000.txt": "a red square",
            "000000001.json": json.dumps({"status": "failed_to_download", "url": "http://x/1"}),
        },
    )
    write_tar(raw / "00001.tar", {"000010000.webp": BLUE, "000010001.png": GREEN, "000010001.txt": "a green square"})
    rows = [{"key": "000010000", "url": "http://x/2", "caption": "a blue square", "aesthetic": 6.5}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), raw / "00001.parquet")
    (raw / "00000_stats.json").write_text('{"count": 2}')
    (raw / "00001_stats.json").write_text('{"count": 2}')
    return raw


def test_tars_with_facts_within_or_beside(img2dataset):
    source = open_records([img2dataset], ImportOptions(keep_columns=("aesthetic",)))
    assert [path.name for path in source.files()] == ["00000.tar", "00001.tar"] and source.count() == 4
    first, failed, third, fourth = source.read(0, 4)
    fields = first.fields()
    assert fields["caption"] == "a red square" and fields["meta"]["width"] == 16
    assert first.identity(fields) == "ab" * 32 and first.picture(fields["image"]) == RED
    with pytest.raises(Reject, match="failed_to_download") as caught:
        failed.fields()
    assert caught.value.reason == "missing_image"
    fields = third.fields()
    assert fields["caption"] == "a blue square" and fields["meta"]["aesthetic"] == 6.5
    assert third.identity(fields) == "http://x/2" and third.picture(fields["image"]) == BLUE
    fields = fourth.fields()
    assert fields["caption"] == "a green square" and fourth.identity(fields) == "00001/000010001"
    assert [str(record) for record in source.read(2, 3)] == [str(third)] and str(third).endswith("00001.tar: 000010000")


def test_another_parquet_beside_tars_is_not_passed_over(img2dataset):
    parquet.write_table(pyarrow.table({"text": ["x"]}), img2dataset / "extra.parquet")
    with pytest.raises(UserError, match="not read together"):
        open_records([img2dataset])
    assert open_records([img2dataset], ImportOptions(format=Format.img2dataset)).count() == 4


# ---- pictures that records only name ---------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    """A document of OBELICS: pictures by URL."""
    urls = ["http://x/red?size=1", "http://x/0", "http://x/mapped", "http://x/gone"]
    row = {"images": [None, *urls], "texts": ["see", None, None, None, None]}
    return put(tmp_path / "pages", {"a.jsonl": json.dumps(row)}) / "a.jsonl", urls


def test_pictures_by_url_from_directories_tars_and_maps(page, img2dataset, tmp_path):
    path, urls = page
    put(tmp_path / "by_hash", {hashlib.sha256(urls[0].encode()).hexdigest() + ".png": GREEN})
    put(tmp_path / "maps", {"files/m.webp": BLUE, "map.jsonl": json.dumps({"url": urls[2], "file": "files/m.webp"})})
    images = (tmp_path / "by_hash", img2dataset / "00000.tar", tmp_path / "maps" / "map.jsonl")
    source = open_records([path], ImportOptions(images=images))
    for one in (source, pickle.loads(pickle.dumps(source))):
        (record,) = one.read(0, 1)
        assert [record.picture(url) for url in urls[:3]] == [GREEN, RED, BLUE]
        with pytest.raises(Reject, match="neither in the directories nor in the tars") as caught:
            record.picture(urls[3])
        assert caught.value.reason == "missing_image"
        with pytest.raises(Reject, match="never run"):
            record.picture("pipe:cat /etc/passwd")


def test_pictures_by_name_from_tars_and_beside(img2dataset, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text_list": [], "image_info": []}\n')
    (tmp_path / "beside.png").write_bytes(GREEN)
    (record,) = open_records([tmp_path / "a.jsonl"], ImportOptions(images=(img2dataset,))).read(0, 1)
    assert record.picture("000000000.jpg") == RED and record.picture("000010000") == BLUE
    assert record.picture("beside.png") == GREEN
    for name, reason in (("../up.png", "bad_path"), ("gone.png", "missing_image")):
        with pytest.raises(Reject) as caught:
            record.picture(name)
        assert caught.value.reason == reason


def test_pictures_that_are_too_large_are_not_read(img2dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.prepare.importers.pictures.MAX_PICTURE_BYTES", 100)
    parquet.write_table(pyarrow.table({"image": [RED], "caption": ["red"]}), tmp_path / "a.parquet")
    put(tmp_path / "folder", {"a.png": RED, "a.txt": "red"})
    for path in (tmp_path / "a.parquet", tmp_path / "folder", img2dataset / "00000.tar"):
        record = records_of(path)[0]
        fields = record.fields() if path.suffix != ".tar" else {"image": "000000000.jpg"}
        with pytest.raises(Reject, match="more than 100 bytes") as caught:
            record.picture(fields["image"])
        assert caught.value.reason == "too_large"


def test_places_of_pictures_that_are_none_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    for name, content, complaint in (
        ("gone", None, "gone: pictures are looked for in directories"),
        ("m.csv", "a,b", r"m\.csv: pictures are looked for"),
        ("m.jsonl", '{"url": "x"}', r"m\.jsonl:1: a line of a map"),
        ("t.tar", "x" * 600, r"t\.tar: damaged tar"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=complaint):
            open_records([tmp_path / "a.jsonl"], ImportOptions(images=(tmp_path / name,)))
