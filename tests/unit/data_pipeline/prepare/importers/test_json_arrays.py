"""JSON arrays: ranges of the objects, windows, damage; questions and annotations in the layout of VQAv2."""

import json
import random

import pytest

from data_pipeline.errors import UserError
from data_pipeline.prepare.importers import array
from data_pipeline.prepare.importers.array import array_name, iterate_objects, text_member
from data_pipeline.prepare.records import Reject, open_records

ODD = [
    {"text": 'quotes " and \\ and ] } , [ {'},
    {"text": "ü ß 漢字 \U0001f600", "deep": [[{"a": [1, {"b": None}]}]]},
    {},
    {"text": "long " * 400, "number": -1.5e-3},
    {"text": "\u2028\u0085 end", "empty": [], "flag": True},
]


@pytest.fixture(params=[7, 64, 1 << 20])
def window(request, monkeypatch):
    monkeypatch.setattr(array, "_WINDOW_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("style", [{}, {"ensure_ascii": False}, {"indent": 2}, {"separators": (",", ":")}])
def test_ranges_are_those_of_the_objects(tmp_path, window, style):
    path = tmp_path / "a.json"
    path.write_text(" \n" + json.dumps(ODD, **style) + "\n\n", encoding="utf-8")
    content = path.read_bytes()
    ranges = [(start, end) for start, end, _ in iterate_objects(path)]
    assert [json.loads(content[start:end]) for start, end in ranges] == ODD


def test_records_of_an_array_in_slices(tmp_path, window):
    rows = [{"text": f"t{n}" + "x" * (n % 90)} for n in range(300)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = open_records([tmp_path])
    assert source.count() == 300
    for start, stop in ((0, 300), (17, 40), (299, 400), (5, 5)):
        assert [record.fields() for record in source.read(start, stop)] == rows[start:stop]
    (record,) = source.read(41, 42)
    assert str(record).endswith("a.json: element 41") and record.identity({}) == "a.json:41"


def test_an_empty_array_and_a_mark_of_byte_order(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf [ ] ")
    assert open_records([path]).count() == 0
    path.write_bytes(b'\xef\xbb\xbf[{"text": "a"}]')
    (record,) = open_records([path]).read(0, 1)
    assert record.fields() == {"text": "a"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'[{"text": "a"}', "found 'the end of the file'"),
        (b'[{"text": "a"} {"text": "b"}]', "expected ','"),
        (b'[{"text": "a"}, 3]', "is no object"),
        (b'[{"text": }]', "at byte 1"),
        (b'[{"text": "a', "at byte 1"),
        (b"[" * 50_000, "at byte 1"),
    ],
)
def test_damage_is_named_with_its_place(tmp_path, window, content, complaint):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: .*{complaint}"):
        open_records([path]).count()


def test_memory_stays_small(tmp_path, monkeypatch):
    """The window never holds more than an object and a window."""
    monkeypatch.setattr(array, "_WINDOW_BYTES", 4_096)
    longest = 0
    real = array._Window._more

    def noting(self, count):
        nonlocal longest
        went_on = real(self, count)
        longest = max(longest, len(self._text))
        return went_on

    monkeypatch.setattr(array._Window, "_more", noting)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "y" * 1_000} for _ in range(500)]))
    assert sum(1 for _ in iterate_objects(path)) == 500
    assert longest < 3 * 4_096 < path.stat().st_size / 40


def test_members_of_objects_are_found_wherever_they_stand(tmp_path, window):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps({"licenses": [{"a": [1]}], "info": {"questions": []}, "questions": [{"q": 1}], "z": "last"})
    )
    assert array_name(path, ("annotations", "questions")) == "questions"
    assert array_name(path, ("annotations",)) == "" and text_member(path, "z") == "last"
    assert [value for _, _, value in iterate_objects(path, "questions")] == [{"q": 1}]
    with pytest.raises(UserError, match="no array 'other'"):
        list(iterate_objects(path, "other"))


# ---- VQAv2 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def vqa(tmp_path):
    """Questions and, in another order, annotations; one question has none."""
    questions = [{"image_id": 9 + n, "question": f"What is {n}?", "question_id": 1_000_000 - n} for n in range(20)]
    annotations = [
        {
            "question_id": question["question_id"],
            "multiple_choice_answer": f"it is {n}",
            "answers": [{"answer": "no", "answer_id": 1}],
            "image_id": question["image_id"],
        }
        for n, question in enumerate(questions[:-1])
    ]
    random.Random(1).shuffle(annotations)
    head = {"info": {"year": 2017}, "data_subtype": "val2014"}
    (tmp_path / "questions.json").write_text(json.dumps(head | {"questions": questions, "license": {}}))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations[:7], **head}))
    (tmp_path / "more.json").write_text(json.dumps({"annotations": annotations[7:]}))
    return tmp_path


def test_questions_are_joined_with_annotations(vqa, window):
    (vqa / "000000000010.jpg").write_bytes(b"")
    source = open_records([vqa])
    assert source.count() == 20
    assert {path.name for path in source.files()} == {"questions.json", "annotations.json", "more.json"}
    records = list(source.read(0, 20))
    for n, record in enumerate(records[:-1]):
        fields = record.fields()
        assert (fields["question"], fields["answer"]) == (f"What is {n}?", f"it is {n}")
        assert record.identity(fields) == str(1_000_000 - n)
        assert fields["image"] == ("000000000010.jpg" if n == 1 else f"COCO_val2014_{9 + n:012d}.jpg")
    with pytest.raises(Reject) as caught:
        records[-1].fields()
    assert caught.value.reason == "no_answer"
    assert [str(record) for record in source.read(4, 6)] == [str(record) for record in records[4:6]]


def test_one_file_of_the_pair_is_not_enough(vqa):
    with pytest.raises(UserError, match=r"questions\.json: it has questions only"):
        open_records([vqa / "questions.json"])
    with pytest.raises(UserError, match=r"annotations\.json: it has annotations only"):
        open_records([vqa / "annotations.json"])
