"""Records of others in our form: OBELICS, MMC4, LLaVA, VQA, captions and texts under other names."""

import json

import pytest

from data_pipeline.prepare.importing import Format, ImageSide, ImportOptions
from data_pipeline.prepare.records import Reject, open_records


def fields_of(tmp_path, row, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (record,) = open_records([path], ImportOptions(**options)).read(0, 1)
    return record.fields()


OBELICS = {
    "images": ["http://x/1.jpg", None, None, "http://x/2.jpg"],
    "texts": [None, "a text", "another", None],
    "metadata": "[]",
    "general_metadata": json.dumps({"url": "http://page"}),
}


def test_obelics_rows_become_segments(tmp_path):
    fields = fields_of(tmp_path, OBELICS)
    assert fields["segments"] == [
        {"image": "http://x/1.jpg"},
        {"text": "a text"},
        {"text": "another"},
        {"image": "http://x/2.jpg"},
    ]
    assert fields["meta"] == {"url": "http://page"} and "metadata" not in fields
    assert fields_of(tmp_path, OBELICS | {"general_metadata": "{broken"})["meta"] == {}


@pytest.mark.parametrize(
    "row", [{"images": [None], "texts": [None]}, {"images": ["u"], "texts": ["t"]}, {"images": [], "texts": ["t"]}]
)
def test_lists_that_do_not_belong_together_are_rejected(tmp_path, row):
    with pytest.raises(Reject, match="OBELICS"):
        fields_of(tmp_path, row)


MMC4 = {
    "text_list": ["First.", "Second.", "Third."],
    "image_info": [
        {"image_name": "b.png", "raw_url": "http://x/b", "matched_text_index": 1, "matched_sim": 0.3},
        {"image_name": "c.png", "matched_text_index": 2},
        {"raw_url": "http://x/d", "matched_text_index": 1},
    ],
    "similarity_matrix": [[0.1]],
    "url": "http://page",
}


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (ImageSide.before, ["First.", "b", "d", "Second.", "c", "Third."]),
        (ImageSide.after, ["First. Second.", "b", "d", "Third.", "c"]),
    ],
)
def test_mmc4_pictures_stand_beside_their_sentence(tmp_path, side, expected):
    names = {"b": "b.png", "c": "c.png", "d": "http://x/d"}
    segments = [{"image": names[part]} if part in names else {"text": part} for part in expected]
    fields = fields_of(tmp_path, MMC4, image_side=side)
    assert fields["segments"] == segments and fields["url"] == "http://page" and "similarity_matrix" not in fields


def test_mmc4_takes_the_name_under_which_the_picture_is_there(tmp_path):
    (tmp_path / "map.jsonl").write_text(json.dumps({"url": "http://x/b", "file": "p.png"}) + "\n")
    fields = fields_of(tmp_path, MMC4, images=(tmp_path / "map.jsonl",))
    assert fields["segments"][1] == {"image": "http://x/b"}


@pytest.mark.parametrize("index", [-1, 3, None, "1", True])
def test_a_match_with_no_sentence_is_rejected(tmp_path, index):
    row = MMC4 | {"image_info": [{"image_name": "b.png", "matched_text_index": index}]}
    with pytest.raises(Reject, match="no sentence of 3"):
        fields_of(tmp_path, row)


def test_conversations_by_either_name(tmp_path):
    llava = {
        "id": "7",
        "image": "coco/x.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "nobody answers"},
        ],
    }
    turns = [{"role": "user", "text": "<image>\nWhat?"}, {"role": "assistant", "text": "A cat."}]
    assert fields_of(tmp_path, llava) == {"id": "7", "images": ["coco/x.jpg"], "conversation": turns}
    roles = ("system", "user", "assistant")
    messages = [{"role": role, "content": role.upper()} for role in roles]
    fields = fields_of(tmp_path, {"messages": messages})
    assert fields == {"images": [], "conversation": [{"role": role, "text": role.upper()} for role in roles]}


@pytest.mark.parametrize(
    "turns", [[{"from": "narrator", "value": "x"}], [{"from": "human", "value": 3}], ["hello"], [{"value": "x"}]]
)
def test_turns_that_are_none_are_rejected(tmp_path, turns):
    with pytest.raises(Reject) as caught:
        fields_of(tmp_path, {"conversations": turns})
    assert caught.value.reason in ("bad_roles", "bad_record")


def test_several_answers_become_the_most_frequent(tmp_path):
    row = {"question": "How many?", "answers": ["two", "2", "2", "two"], "image": "a.jpg", "question_id": 5}
    assert fields_of(tmp_path, row) == {"question": "How many?", "answer": "two", "image": "a.jpg", "id": 5}
    row["answers"] = [{"answer": "2"}, {"answer": "2"}, {"answer": "two"}]
    assert fields_of(tmp_path, row)["answer"] == "2"
    row["multiple_choice_answer"] = "several"
    assert fields_of(tmp_path, row)["answer"] == "several"
    with pytest.raises(Reject, match="no answer"):
        fields_of(tmp_path, {"question": "How many?", "answers": []})


def test_names_of_columns_are_found_or_given(tmp_path):
    row = {"image_path": "a.png", "text": "a cat", "score": 0.5}
    assert fields_of(tmp_path, row) == {"image": "a.png", "caption": "a cat", "score": 0.5}
    assert fields_of(tmp_path, {"file_name": "a.png", "text": ["a", "b"]}) == {"image": "a.png", "captions": ["a", "b"]}
    row = {"photo": "a.png", "alt": "a cat", "text": "not this"}
    fields = fields_of(tmp_path, row, image_column="photo", caption_column="alt")
    assert (fields["image"], fields["caption"]) == ("a.png", "a cat")
    assert fields_of(tmp_path, {"content": "words", "image": "a.png"}, format=Format.text)["text"] == "words"
    assert fields_of(tmp_path, {"body": "words"}, text_column="body") == {"text": "words"}
    with pytest.raises(Reject, match="no field 'alt'; it has text"):
        fields_of(tmp_path, {"text": "x"}, caption_column="alt")
    with pytest.raises(Reject, match="no field 'body'; it has text"):
        fields_of(tmp_path, {"text": "x"}, text_column="body")


def test_our_own_forms_stay_as_they_are(tmp_path):
    for row in (
        {"segments": [{"text": "a"}], "texts": "x"},
        {"question": "a", "answer": "b", "image": "c"},
        {"image": "a", "captions": ["b"]},
        {"text": "a", "id": "b"},
        {"text": 1},
        {},
    ):
        assert fields_of(tmp_path, row) == row
