"""Image ids in shards: once per picture, crops side by side, in the promised bytes, at nearly the encoder's speed."""

import gc
import json
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import webdataset

from data_pipeline.dialogue import caption_text
from data_pipeline.errors import UserError
from data_pipeline.images import decode_image
from data_pipeline.manifest import open_source
from data_pipeline.prepare.crops import crops_of, distinct
from data_pipeline.prepare.measure import measure_encoding
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.t2i import prepare_t2i
from data_pipeline.spec import ImageGeometry
from data_pipeline.stream.read import SampleReader
from data_pipeline.uid import uid_text
from janus_mega.config.schema import ImageTokenizerConfig
from janus_mega.models.vision.image_tokenizer import (
    load_image_tokenizer,
    pictures_at_once,
    save_image_tokenizer,
)
from tests.support.raw import ColourTokenizer, picture, picture_bytes, train_tokenizer, write_jsonl, write_raw

GEOMETRY = ImageGeometry(
    understanding_size=16, understanding_tokens=16, generation_size=16, generation_tokens=16, codebook_size=64
)
OPTIONS = PrepareOptions(samples_per_shard=8, record_size=4, encode_batch_size=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_raw(tmp_path_factory.mktemp("raw"), 10)["t2i"]


def records_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Noting(ColourTokenizer):
    """Notes the batches that it gets."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def encode(self, images):
        self.batches.append(images.copy())
        return super().encode(images)


@pytest.mark.parametrize("flips", [False, True])
def test_crops_lie_side_by_side_and_are_those_of_the_uid(raw, tokenizer, tmp_path, flips):
    prepare_t2i([raw], tmp_path / "out", tokenizer, ColourTokenizer(), options=replace(OPTIONS, crops=3, flips=flips))
    source = open_source(tmp_path / "out")
    assert source.manifest.image_tokenizer.num_variants == 3
    reader = SampleReader(source, GEOMETRY)
    i = 0
    for record in records_of(raw):
        content = (raw.parent / record["image"]).read_bytes()
        crops = crops_of(content, uid_text(record["id"]), 16, 3, flips)
        expected = ColourTokenizer().encode(np.stack(crops))
        for number in range(len(record["captions"])):
            assert source.uid(i) == uid_text(record["id"]) and source.caption_number[i] == number
            for variant in range(3):
                assert reader.read(i, variant).image_ids.tolist() == expected[variant].tolist()
            i += 1
    assert i == len(source) == 15


def test_ids_are_stored_once_however_many_captions_there_are(raw, tokenizer, tmp_path):
    """Images of a record are rows of vq.npy; its captions, never parted, point at them."""
    captions = [["a"] * (1 + n % 5) for n in range(10)]
    path = write_jsonl(
        raw.parent / "many.jsonl", [r | {"captions": c} for r, c in zip(records_of(raw), captions, strict=True)]
    )
    prepare_t2i([path], tmp_path / "out", tokenizer, ColourTokenizer(), options=OPTIONS)
    source = open_source(tmp_path / "out")
    assert len(source) == sum(map(len, captions)) == 30
    assert len(np.unique(source.image_offset[source.first_samples[0] : source.first_samples[1]])) == 8
    starts = np.flatnonzero(source.caption_number == 0)
    assert len(starts) == 10 and np.diff([*starts, 30]).tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
    for start, end in zip(starts, [*starts[1:], 30], strict=True):
        assert len(set(source.image_offset[start:end].tolist())) == 1
        assert len({source.uid(i) for i in range(start, end)}) == 1
    assert len({source.uid(i) for i in starts}) == 10


def test_stock_webdataset_reads_crops_and_captions(raw, tokenizer, tmp_path):
    prepare_t2i([raw], tmp_path / "out", tokenizer, ColourTokenizer(), options=replace(OPTIONS, crops=3))
    source, i = open_source(tmp_path / "out"), 0
    reader = SampleReader(source, GEOMETRY)
    urls = sorted(str(path) for path in (tmp_path / "out" / "shards").iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the tars to the garbage collector
        records = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
        gc.collect()
    for record in records:
        vq, starts = record["vq.npy"], [0, *record["off.npy"].tolist()]
        assert vq.shape[1] == 3 * 16 and vq.dtype == np.uint16 and record["json"]["crops"] == 3
        assert len(vq) == len(set(record["cap.npy"].tolist())) <= len(record["cap.npy"]) == record["json"]["n"]
        for row, image in enumerate(record["cap.npy"].tolist()):
            assert record["tok.npy"][starts[row] : starts[row + 1]].tolist() == reader.read(i).caption_ids.tolist()
            assert vq[image, 32:].tolist() == reader.read(i, 2).image_ids.tolist()
            i += 1
    assert i == len(source)


def test_equal_crops_are_encoded_once_and_batches_depend_on_the_shard_alone(raw, tokenizer, tmp_path):
    first, second = Noting(), Noting()
    prepare_t2i([raw], tmp_path / "out", tokenizer, first, options=replace(OPTIONS, crops=2))
    views = [crops_of((raw.parent / r["image"]).read_bytes(), uid_text(r["id"]), 16, 2, False) for r in records_of(raw)]
    different = [len(distinct(pair)[0]) for pair in views]
    assert sum(different[:8]) == 10 and sum(different[8:]) == 3
    assert [len(batch) for batch in first.batches] == [3, 3, 3, 1, 3]
    prepare_t2i([raw], tmp_path / "b", tokenizer, second, options=replace(OPTIONS, crops=2, jobs=2, job=1))
    for batch, again in zip(first.batches[-1:], second.batches, strict=True):
        assert np.array_equal(batch, again)


def test_a_picture_with_too_many_captions_is_named(raw, tokenizer, tmp_path):
    path = write_jsonl(raw.parent / "too_many.jsonl", [records_of(raw)[0] | {"captions": ["a"] * 257}])
    with pytest.raises(UserError, match=r"too_many\.jsonl:1: 257 captions of one picture, at most 256"):
        prepare_t2i([path], tmp_path / "out", tokenizer, ColourTokenizer(), options=OPTIONS)


def test_576_ids_and_a_caption_of_40_tokens_take_1300_bytes(tokenizer, tmp_path):
    content = picture_bytes(picture("red", 48, 48))
    (tmp_path / "red.png").write_bytes(content)
    caption = ""
    while len(tokenizer.encode(caption_text(caption))) < 40:
        caption += "the"
    records = [{"id": f"r{n}", "image": "red.png", "caption": caption} for n in range(1200)]
    path = write_jsonl(tmp_path / "r.jsonl", records)
    images = ColourTokenizer(image_size=48, grid=24)
    report = prepare_t2i([path], tmp_path / "out", tokenizer, images)
    assert images.num_tokens == 576 and report.num_text_tokens >= 40 * 1200
    shards = sum(path.stat().st_size for path in (tmp_path / "out" / "shards").iterdir())
    assert 576 * 2 + 40 * 2 < shards / 1200 <= 1300


# ---- the real image tokenizer ----------------------------------------------------------------------------------------


def vq_directory(path, **sizes):
    import torch

    from janus_mega.models.vision.vq import VqModel

    torch.manual_seed(0)
    config = ImageTokenizerConfig(**{"base_channels": 32, "codebook_size": 64, "image_size": 32} | sizes)
    save_image_tokenizer(VqModel(config), config, path)
    return path


def test_a_pool_loads_the_real_tokenizer_again_and_writes_the_same_bytes(raw, tokenizer, tmp_path):
    vq = load_image_tokenizer(vq_directory(tmp_path / "vq"))
    for out, workers in (("one", 1), ("two", 2)):
        prepare_t2i(
            [raw], tmp_path / out, tokenizer, vq, options=replace(OPTIONS, samples_per_shard=3, workers=workers)
        )
    for path in (tmp_path / "one" / "shards").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "shards" / path.name).read_bytes()
    manifest = open_source(tmp_path / "two").manifest
    assert manifest == open_source(tmp_path / "one").manifest and manifest.image_tokenizer.digest == vq.digest


def test_prepare_takes_little_more_than_the_bare_tokenizer(raw, tokenizer, tmp_path):
    """The hard case: at 384 px and full width the forward pass takes a hundred times more than here."""
    config = vq_directory(tmp_path / "vq", image_size=96)
    speed = measure_encoding([raw], tmp_path / "out", tokenizer, load_image_tokenizer(config), OPTIONS)
    assert speed.num_images == 10 and speed.bytes_per_image > 2 * 36
    assert speed.cpu_ratio > 0.5, speed.lines()
    assert len(speed.lines()) == 2


def test_batches_fit_the_width_of_the_network_and_the_device():
    import torch

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    full, tiny = ImageTokenizerConfig(), ImageTokenizerConfig(image_size=32, base_channels=32)
    assert (pictures_at_once(full, cpu), pictures_at_once(full, cuda)) == (2, 16)
    assert pictures_at_once(tiny, cpu) == 64


def test_workers_take_the_devices_in_turn(monkeypatch):
    import torch

    from janus_mega.models.vision.image_tokenizer import encoding_device

    monkeypatch.setitem(os.environ, "LOCAL_RANK", "5")
    assert encoding_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert encoding_device() == torch.device("cuda", 1)


def test_pictures_of_all_formats_decode_in_threads(raw, tokenizer, tmp_path):
    """The order of the records is kept although pictures of different cost are decoded side by side."""
    images = Noting()
    prepare_t2i([raw], tmp_path / "out", tokenizer, images, options=replace(OPTIONS, encode_batch_size=1))
    for record, batch in zip(records_of(raw), images.batches, strict=True):
        pixels = decode_image((raw.parent / record["image"]).read_bytes())
        assert abs(pixels.mean((0, 1)) - batch[0].mean((1, 2))).max() < 8
