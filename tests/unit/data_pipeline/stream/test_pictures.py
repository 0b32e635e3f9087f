"""Raw pictures of an image tokenizer: which, in which order, cropped how, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.stream.pictures import PictureSet, epoch_order


def write_records(root: Path, names: list[str], file: str = "captions.jsonl") -> Path:
    """A record file that names `names` in order."""
    path = root / file
    path.write_text("".join(json.dumps({"id": str(i), "image": n, "caption": "x"}) + "\n" for i, n in enumerate(names)))
    return path


def write_picture(root: Path, name: str, colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> None:
    """A picture of one colour; `size` is width and height."""
    Image.new("RGB", size, colour).save(root / name)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Three pictures, of which the first has two captions."""
    for number in range(3):
        write_picture(tmp_path, f"{number}.png", (number * 50, 1, 2))
    return write_records(tmp_path, ["0.png", "1.png", "0.png", "2.png"])


def test_each_picture_counts_once_in_the_order_of_the_records(raw: Path) -> None:
    pictures = PictureSet([raw], 8)
    assert len(pictures) == 3
    batch = pictures.read_many([2, 0, 1, 0])
    assert (batch.dtype, batch.shape) == (np.uint8, (4, 3, 8, 8))
    assert batch[:, 0, 0, 0].tolist() == [100, 0, 50, 0]
    assert batch[0, :, 3, 4].tolist() == [100, 1, 2]


def test_the_crop_is_the_one_that_generation_uses(tmp_path: Path) -> None:
    wide = Image.new("RGB", (32, 8), (255, 0, 0))
    wide.paste((0, 255, 0), (12, 0, 20, 8))
    wide.save(tmp_path / "wide.png")
    picture = PictureSet([write_records(tmp_path, ["wide.png"])], 8).read(0)
    assert (picture[0] == 0).all() and (picture[1] == 255).all(), "only the middle is seen"


def test_a_picture_is_read_from_its_file_once(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = PictureSet([raw], 8)
    first = pictures.read(1)
    (raw.parent / "1.png").unlink()
    assert np.array_equal(pictures.read(1), first)
    monkeypatch.setattr("data_pipeline.stream.pictures.CACHE_BYTES", 10)
    large = PictureSet([raw], 8)
    assert np.array_equal(large.read(2), pictures.read(2))
    (raw.parent / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png"):
        large.read(2)


def test_the_digest_is_that_of_names_in_order(raw: Path, tmp_path: Path) -> None:
    digest = PictureSet([raw], 8).digest
    assert PictureSet([write_records(tmp_path, ["0.png", "1.png", "2.png"], "fewer.jsonl")], 8).digest == digest
    assert PictureSet([write_records(tmp_path, ["1.png", "0.png", "2.png"], "other.jsonl")], 8).digest != digest


def test_epochs_are_permutations_and_any_window_of_them_is_the_same() -> None:
    whole = epoch_order(7, 0, 35, seed=3)
    assert all(sorted(whole[i : i + 7]) == list(range(7)) for i in range(0, 35, 7))
    assert len({tuple(whole[i : i + 7]) for i in range(0, 35, 7)}) > 1, "epochs differ"
    parts = [epoch_order(7, start, 5, seed=3) for start in range(0, 35, 5)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(epoch_order(7, 0, 35, seed=4), whole)
    assert epoch_order(7, 20, 0, seed=3).shape == (0,)
    assert epoch_order(2, 1, 9, seed=0).shape == (9,)


def test_what_is_no_picture_is_refused_with_its_line(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        PictureSet([tmp_path / "nowhere.jsonl"], 8)
    (tmp_path / "text.jsonl").write_text('{"id": "0", "image": "0.png"}\n{"text": "no picture"}\n')
    with pytest.raises(UserError, match=r"text\.jsonl:2: no 'image'"):
        PictureSet([tmp_path / "text.jsonl"], 8)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no record"):
        PictureSet([tmp_path / "empty.jsonl"], 8)
    (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(UserError, match=r"captions\.jsonl:1: image '0\.png'"):
        PictureSet([raw], 8).read(0)
    outside = PictureSet([write_records(tmp_path, ["../secret.png"], "outside.jsonl")], 8)
    with pytest.raises(UserError, match="must be a path below"):
        outside.read(0)
