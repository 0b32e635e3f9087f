"""Raw files: what is written is what is read, and nothing held out is in a training record."""

import json

import numpy as np
import pytest

from janus_mega.demo import raw
from janus_mega.demo.digits import RecordCounts
from janus_mega.demo.prose import Prose, Text

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    root = tmp_path_factory.mktemp("demo") / "raw"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw, "collect_prose", lambda: Prose((Text("a:0", "train"),), (Text("b:0", "held"),)))
        data = raw.write_raw(root, 16, RecordCounts(pairs=50, differences=60), seed=0)
    return root, data


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_pictures_and_labels_come_back(written):
    root, data = written
    again = raw.read_raw(root)
    assert (again.train == data.train).all() and (again.held_out == data.held_out).all()
    assert (again.train_labels == data.train_labels).all() and (again.held_out_labels == data.held_out_labels).all()
    assert data.train.shape == (1440, 16, 16) and data.train.dtype == np.uint8
    assert not root.with_name("raw.tmp").exists()


def test_records_name_training_pictures_that_exist(written):
    root, _ = written
    named = set()
    for name in ("captions", "descriptions", "questions", "pairs", "differences"):
        for record in records(root / f"{name}.jsonl"):
            named |= {segment["image"] for segment in record.get("segments", [record]) if "image" in segment}
    assert len(named) == 1440
    assert all(path.startswith("pictures/train/") and (root / path).is_file() for path in named)


def test_counts_of_records(written):
    root, _ = written
    sizes = {path.stem: len(records(path)) for path in root.glob("*.jsonl")}
    assert sizes == {
        "captions": 1440,
        "descriptions": 1440,
        "questions": 4 * 1440,
        "pairs": 50,
        "differences": 60,
        "prose_train": 1,
        "prose_held_out": 1,
    }
