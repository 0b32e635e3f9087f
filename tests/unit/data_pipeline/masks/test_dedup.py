"""Duplicates in real shards: within a source, across sources, by content, by picture and by its look."""

import json

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.manifest import open_source
from data_pipeline.masks.dedup import Dedup, DedupOptions, find_duplicates
from data_pipeline.prepare.interleaved import prepare_interleaved
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.t2i import prepare_t2i
from data_pipeline.prepare.text import prepare_text
from tests.support.pictures import COPIES, encoded, photograph_tiles, scenes
from tests.support.raw import PROSE, ColourTokenizer, write_jsonl

OPTIONS = PrepareOptions(samples_per_shard=4, record_size=3)


def write_pictures(root, pictures):
    """Writes picture files; returns their names."""
    (root / "p").mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        (root / "p" / name).write_bytes(content)
    return {name: f"p/{name}" for name in pictures}


def documents(root, tokenizer, pictures, rows):
    """Prepares documents of (pictures, text)."""
    names = write_pictures(root, pictures)
    records = [
        {"id": f"d{n}", "segments": [*({"image": names[name]} for name in used), {"text": text}]}
        for n, (used, text) in enumerate(rows)
    ]
    prepare_interleaved([write_jsonl(root / "raw.jsonl", records)], root / "out", tokenizer, options=OPTIONS)
    return open_source(root / "out")


def drawings(root, tokenizer, pictures, rows, ids=None):
    """Prepares drawings of (picture, captions)."""
    names = write_pictures(root, pictures)
    records = [
        {"id": ids[n] if ids else f"d{n}", "image": names[name], "captions": captions}
        for n, (name, captions) in enumerate(rows)
    ]
    prepare_t2i([write_jsonl(root / "raw.jsonl", records)], root / "out", tokenizer, ColourTokenizer(), options=OPTIONS)
    return open_source(root / "out")


def texts(root, tokenizer, rows):
    records = [{"id": f"t{n}", "text": text} for n, text in enumerate(rows)]
    prepare_text([write_jsonl(root / "raw.jsonl", records)], root / "out", tokenizer, options=OPTIONS)
    return open_source(root / "out")


def duplicates(*sources, mode, out=None, **options):
    """Numbers of the duplicates of every source."""
    out = out or [np.zeros(len(source), bool) for source in sources]
    found = find_duplicates(sources, out, DedupOptions(mode=Dedup[mode], **options))
    return [np.flatnonzero(part.left_out).tolist() for part in found]


@pytest.fixture(scope="module")
def photographs():
    return photograph_tiles()


def test_exact_texts_within_and_across_sources(tmp_path, tokenizer):
    first = texts(tmp_path / "1", tokenizer, [PROSE[0], PROSE[1], PROSE[0], PROSE[2], PROSE[1]])
    second = texts(tmp_path / "2", tokenizer, [PROSE[3], PROSE[2], PROSE[3], PROSE[0]])
    assert duplicates(first, second, mode="exact") == [[2, 4], [1, 2, 3]]
    assert duplicates(second, first, mode="exact") == [[2], [0, 2, 3, 4]]


def test_exact_documents_need_the_same_text(tmp_path, tokenizer, photographs):
    a, b = encoded(photographs[0]), encoded(photographs[1])
    rows = [("a", "one"), ("a", "two"), ("b", "one"), ("a", "one"), ("ab", "one"), ("ba", "one"), ("ab", "one")]
    source = documents(tmp_path, tokenizer, {"a": a, "b": b}, rows)
    assert duplicates(source, mode="exact") == [[3, 6]]
    assert duplicates(source, mode="picture") == [[1, 3, 6]]
    assert duplicates(source, mode="near") == [[1, 3, 6]]


def test_near_finds_copies_of_all_kinds_across_sources(tmp_path, tokenizer, photographs):
    chosen = [*scenes(6), *photographs[-6:]]
    originals = {f"{n}": encoded(pixels) for n, pixels in enumerate(chosen)}
    first = documents(tmp_path / "1", tokenizer, originals, [([name], "text") for name in originals])
    made = {f"{n}-{k}": copy(chosen[n]) for k, copy in enumerate(COPIES.values()) for n in range(4)}
    made |= {f"new{n}": encoded(pixels) for n, pixels in enumerate(scenes(5, seed=9))}
    second = documents(tmp_path / "2", tokenizer, made, [([name], f"text {name}") for name in made])
    copies = [number for number, name in enumerate(made) if not name.startswith("new")]
    assert duplicates(first, second, mode="near") == [[], copies]
    assert duplicates(first, second, mode="picture") == [[], []]
    left = duplicates(second, first, mode="near")
    assert left[1] == [0, 1, 2, 3] and len(left[0]) == len(copies) - 4


def test_documents_are_compared_by_all_their_pictures(tmp_path, tokenizer, photographs):
    files = {name: encoded(photographs[-n]) for n, name in enumerate("abc", start=1)}
    files |= {"A": COPIES["webp"](photographs[-1]), "B": COPIES["half size"](photographs[-2])}
    rows = [("ab", "x"), ("AB", "y"), ("BA", "z"), ("a", "v"), ("abc", "w"), ("", "no picture"), ("", "no picture")]
    source = documents(tmp_path, tokenizer, files, rows)
    assert duplicates(source, mode="near") == [[1]]
    assert duplicates(source, mode="exact") == [[6]]


def test_flat_pictures_are_compared_by_their_bytes(tmp_path, tokenizer):
    pages = {f"{n}": encoded(np.full((60, 60, 3), 200 + n, np.uint8)) for n in range(4)}
    source = documents(tmp_path, tokenizer, pages, [("0", "a"), ("1", "b"), ("0", "c"), ("2", "d")])
    found = find_duplicates([source], [np.zeros(4, bool)], DedupOptions(mode=Dedup.near))[0]
    assert np.flatnonzero(found.left_out).tolist() == [2]
    assert found.notes == {"pictures too flat, compared by their bytes": 4}


def test_what_is_left_out_already_is_no_reason(tmp_path, tokenizer, photographs):
    source = documents(tmp_path, tokenizer, {"a": encoded(photographs[0])}, [("a", "x"), ("a", "y"), ("a", "z")])
    out = [np.array([True, False, False])]
    assert duplicates(source, mode="near", out=out) == [[2]]


def test_captions_of_an_image_stay_together(tmp_path, tokenizer):
    pictures = {f"{n}": encoded(scene, "png") for n, scene in enumerate(scenes(3))}
    rows = [("0", ["a", "b"]), ("1", ["c", "c"]), ("0", ["d", "a"]), ("2", ["e"]), ("1", ["c"])]
    source = drawings(tmp_path, tokenizer, pictures, rows)
    assert [int(n) for n in source.caption_number] == [0, 1, 0, 1, 0, 1, 0, 0]
    assert duplicates(source, mode="picture") == [[4, 5, 7]]
    # Sample 5 draws what 0 draws from the same caption; so do 3 and 7 and 2.
    assert duplicates(source, mode="exact") == [[3, 5, 7]]
    # The first caption of image 0 being out, its second one still stands for the image.
    out = [np.array([True] + [False] * 7)]
    assert duplicates(source, mode="picture", out=out) == [[4, 5, 7]]
    out = [np.array([True, True] + [False] * 6)]
    assert duplicates(source, mode="picture", out=out) == [[7]]


def test_drawings_take_looks_from_their_pictures(tmp_path, tokenizer):
    made = scenes(3)
    pictures = {f"{n}": encoded(scene) for n, scene in enumerate(made)}
    pictures |= {"0 again": COPIES["half size"](made[0]), "2 again": COPIES["webp"](made[2])}
    images = documents(tmp_path / "images", tokenizer, pictures, [([name], "text") for name in pictures])
    ids = ["d0", "d2", "d3", "d1", "d4", "elsewhere"]
    rows = [(name, ["caption", "other"]) for name in ("0", "2", "0 again", "1", "2 again", "1")]
    source = drawings(tmp_path / "t2i", tokenizer, pictures, rows, ids)
    found = find_duplicates([source], [np.zeros(12, bool)], DedupOptions(mode=Dedup.near, images=images))[0]
    assert np.flatnonzero(found.left_out).tolist() == [4, 5, 8, 9]
    assert found.notes == {"without pictures": 1}
    with pytest.raises(UserError, match="hold ids, not pictures; name the source of their pictures with --images"):
        duplicates(source, mode="near")
    with pytest.raises(UserError, match="hold ids, not pictures"):
        duplicates(source, images, mode="picture")
    with pytest.raises(UserError, match="--images needs a source of pictures, this one is t2i"):
        duplicates(source, mode="near", images=source)
    stranger = documents(tmp_path / "x", tokenizer, {"0": pictures["0"]}, [(["0"], "text")])
    stranger.uids = stranger.uids + np.uint64(1)
    with pytest.raises(UserError, match="has none of the uids of"):
        duplicates(source, mode="near", images=stranger)


def test_texts_have_no_pictures(tmp_path, tokenizer):
    with pytest.raises(UserError, match="texts have no pictures; find their duplicates with --dedup exact"):
        duplicates(texts(tmp_path, tokenizer, ["a"]), mode="near")


def test_damaged_samples_resemble_nothing(tmp_path, tokenizer, photographs):
    rows = [("a", "x"), ("a", "x"), ("a", "x"), ("a", "x")]
    source = documents(tmp_path, tokenizer, {"a": encoded(photographs[0])}, rows)
    tar = source.shard_path(0)
    content = bytearray(tar.read_bytes())
    for number in (0, 2):
        content[int(source.offset[number]) + 700] ^= 1
    tar.write_bytes(content)
    for mode in Dedup:
        found = find_duplicates([source], [np.zeros(4, bool)], DedupOptions(mode=mode))[0]
        assert np.flatnonzero(found.left_out).tolist() == [3] and found.notes == {"damaged": 2}


def test_hashes_are_kept_for_the_next_time(tmp_path, tokenizer, photographs, monkeypatch):
    source = documents(tmp_path, tokenizer, {"a": encoded(photographs[0])}, [("a", "x"), ("a", "y")])
    assert duplicates(source, mode="near") == [[1]]
    kept = source.path / "masks" / f"pictures.look.{source.digest}.npy"
    monkeypatch.setattr("data_pipeline.masks.pictures.over_samples", lambda *_: pytest.fail("read again"))
    assert duplicates(source, mode="near", distance=0) == [[1]]
    assert duplicates(source, mode="picture") == [[1]]
    monkeypatch.undo()
    for damage in (b"", kept.read_bytes()[:-3]):
        kept.write_bytes(damage)
        assert duplicates(source, mode="near") == [[1]]
    # Hashes of other shards have another name.
    manifest = source.path / "janus.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "licence": "CC0"}))
    assert duplicates(open_source(source.path), mode="near") == [[1]]
    assert len(list(kept.parent.iterdir())) == 2


def test_several_processes_find_the_same(tmp_path, tokenizer, monkeypatch):
    made = scenes(4)
    files = {f"{n}": encoded(scene) for n, scene in enumerate(made)}
    source = documents(tmp_path, tokenizer, files, [(f"{n % 4}", f"{n}") for n in range(12)])
    monkeypatch.setattr("data_pipeline.masks.passes._RUN", 3)
    ticks = []
    found = find_duplicates(
        [source],
        [np.zeros(12, bool)],
        DedupOptions(mode=Dedup.near, workers=2),
        lambda _: lambda done, total: ticks.append((done, total)),
    )[0]
    assert np.flatnonzero(found.left_out).tolist() == list(range(4, 12))
    assert ticks == [(3, 12), (6, 12), (9, 12), (12, 12)]
