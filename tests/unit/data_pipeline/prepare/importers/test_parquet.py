"""Parquet: columns by name, row groups, pictures as bytes or paths, refusals."""

import pyarrow
import pytest
from pyarrow import parquet

from data_pipeline.errors import UserError
from data_pipeline.prepare.importing import Format, ImportOptions
from data_pipeline.prepare.records import Reject, open_records
from tests.support.raw import picture, picture_bytes

RED = picture_bytes(picture("red"))
BLUE = picture_bytes(picture("blue"), "jpeg")


def write(path, columns, row_group_size=3):
    parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def records_of(path, **options):
    source = open_records([path], ImportOptions(**options))
    return list(source.read(0, source.count()))


def test_texts_with_facts_in_slices(tmp_path):
    """FineWeb's columns; slices begin and end inside row groups."""
    columns = {
        "text": [f"text {n}" for n in range(200)],
        "id": [f"<urn:uuid:{n}>" for n in range(200)],
        "dump": ["CC"] * 200,
        "url": [f"http://{n}" for n in range(200)],
        "language": ["en"] * 200,
        "language_score": [n / 200 for n in range(200)],
    }
    path = write(tmp_path / "a.parquet", columns, row_group_size=90)
    source = open_records([path], ImportOptions(keep_columns=("language_score",)))
    assert source.count() == 200
    everything = [record.fields() for record in source.read(0, 200)]
    expected = {"text": "text 95", "id": "<urn:uuid:95>", "url": "http://95", "language": "en", "language_score": 0.475}
    assert everything[95] == expected, "a column was read that nobody asked for, or one was not"
    for start, stop in ((0, 2), (60, 70), (89, 91), (179, 181), (95, 95), (199, 300)):
        assert [record.fields() for record in source.read(start, stop)] == everything[start:stop]
    assert [str(record).rsplit("/", 1)[1] for record in source.read(91, 93)] == [
        "a.parquet: row 91",
        "a.parquet: row 92",
    ]


def test_only_the_row_groups_of_a_slice_are_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"text": [str(n) for n in range(100)]}, row_group_size=10)
    source = open_records([path])
    source.count()
    groups = []
    real = parquet.ParquetFile.iter_batches

    def noting(self, *args, row_groups, **kwargs):
        groups.extend(row_groups)
        return real(self, *args, row_groups=row_groups, **kwargs)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noting)
    assert [record.fields()["text"] for record in source.read(38, 52)] == [str(n) for n in range(38, 52)]
    assert groups == [3, 4, 5]


def test_pictures_as_structs_bytes_and_paths(tmp_path):
    (tmp_path / "beside.png").write_bytes(RED)
    columns = {
        "image": [
            {"bytes": RED, "path": "x.png"},
            {"bytes": BLUE, "path": None},
            {"bytes": None, "path": "beside.png"},
        ],
        "text": ["one", "two", "three"],
    }
    records = records_of(write(tmp_path / "a.parquet", columns))
    for record, expected in zip(records, (RED, BLUE, RED), strict=True):
        fields = record.fields()
        assert record.picture(fields["image"]) == expected
    assert [record.fields()["caption"] for record in records] == ["one", "two", "three"]
    columns = {"jpg": [BLUE, RED], "captions": [["a", "b"], ["c"]]}
    first, second = records_of(write(tmp_path / "b.parquet", columns))
    assert first.fields()["captions"] == ["a", "b"] and first.picture(first.fields()["image"]) == BLUE
    assert second.picture(second.fields()["image"]) == RED
    with pytest.raises(Reject, match=r"other\.png"):
        second.picture("other.png")


def test_conversations_with_several_pictures(tmp_path):
    turns = [{"from": "human", "value": "<image><image> Which?"}, {"from": "gpt", "value": "Both."}]
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.Table.from_pylist(
            [
                {
                    "id": "1",
                    "images": [{"bytes": RED, "path": "same"}, {"bytes": BLUE, "path": "same"}],
                    "conversations": turns,
                }
            ]
        ),
        path,
    )
    (record,) = records_of(path)
    fields = record.fields()
    assert [record.picture(name) for name in fields["images"]] == [RED, BLUE]
    assert fields["conversation"][0] == {"role": "user", "text": "<image><image> Which?"}


def test_obelics_rows_with_lists_of_nulls(tmp_path):
    rows = [{"images": [None, "http://x/1"], "texts": ["words", None], "metadata": "[{}]", "general_metadata": "{}"}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (record,) = records_of(path, format=Format.obelics)
    assert record.fields()["segments"] == [{"text": "words"}, {"image": "http://x/1"}]


@pytest.mark.parametrize(
    ("columns", "options", "complaint"),
    [
        ({"strange": ["a"]}, {}, "no column of a known name; it has strange"),
        ({"text": ["a"]}, {"text_column": "body"}, "no column 'body'; it has text"),
        ({"text": ["a"], "model.pth": [b"a"]}, {}, "column 'model.pth' holds pickles"),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(tmp_path, columns, options, complaint):
    path = write(tmp_path / "a.parquet", columns)
    with pytest.raises(UserError, match=rf"a\.parquet: .*{complaint}"):
        records_of(path, **options)


def test_a_damaged_file_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", {"text": ["word " * 50 for _ in range(100)]})
    content = bytearray(path.read_bytes())
    content[4:400] = b"\xff" * 396
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: damaged Parquet file"):
        records_of(path)
    path.write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"a\.parquet: no readable Parquet file"):
        records_of(path)
