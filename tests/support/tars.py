"""Tars made by hand, what stock webdataset gives of them, and what the doctor finds in them."""

import gc
import io
import tarfile
import warnings

import numpy as np
import webdataset
from PIL import Image

from data_pipeline.explain.doctor import examine
from data_pipeline.explain.member_checks import CheckOptions


def tar_of(*members, form=tarfile.USTAR_FORMAT) -> bytes:
    """A tar of (name, content), or of (name, type letter, link) for what has no content."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, *rest in members:
            info = tarfile.TarInfo(name)
            if len(rest) == 2:
                info.type, info.linkname = rest[0].encode(), rest[1]
                tar.addfile(info)
            else:
                info.size = len(rest[0])
                tar.addfile(info, io.BytesIO(rest[0]))
    return stream.getvalue()


CAPTION = b"a small red square"


def picture(kind="jpeg", size=(24, 16), seed=0):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind, quality=80)
    return stream.getvalue()


JPG = picture()


def pairs(*keys):
    return [member for key in keys for member in ((f"{key}.jpg", JPG), (f"{key}.txt", CAPTION))]


def by_webdataset(path, **options):
    """Samples as stock webdataset gives them: {key: {field: bytes}} pairs in order; the last may be an error."""
    samples = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False, **options):
                fields = {name: value for name, value in sample.items() if not name.startswith("__")}
                samples.append((sample["__key__"], fields))
        except Exception as error:
            samples.append(error.with_traceback(None))
            gc.collect()  # a shard that ended in an error is still open
    return samples


def shape(samples):
    """Keys and fields only."""
    return [sample if isinstance(sample, Exception) else (sample[0], sorted(sample[1])) for sample in samples]


def codes(path, **options):
    report = examine([path], CheckOptions(**options))
    return {finding.code for finding in report.findings.kept}


def only(path, code, **options):
    """The findings of one kind, when there is no other."""
    report = examine([path], CheckOptions(**options))
    assert {finding.code for finding in report.findings.kept} == {code}, report.findings.kept
    return report.findings.kept
