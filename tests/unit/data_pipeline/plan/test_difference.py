"""What two plans have different, in words, and the file that keeps what a plan was made of."""

import json
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.plan.difference import IDENTITY_FILE, difference, load_identity, save_identity
from data_pipeline.spec import Captions, Exhausted, ImageGeometry, RatioUnit, Shape, Task, WeightPoint
from tests.support.histograms import plan_of, short_sources


def changed(name="gen", **fields):
    return [replace(taken, **fields) if taken.name == name else taken for taken in short_sources()]


def told(sources=None, **settings):
    ours, theirs = plan_of(short_sources()), plan_of(sources or short_sources(), **settings)
    assert theirs.digest != ours.digest
    return difference(ours.identity, theirs.identity, ("in the checkpoint", "now"))


SOME = np.arange(2000) < 12


@pytest.mark.parametrize(
    ("sources", "settings", "lines"),
    [
        ([], {"seed": 1}, ["seed 0 in the checkpoint, 1 now"]),
        ([], {"ratio_unit": RatioUnit.rows}, ["ratio_unit tokens in the checkpoint, rows now"]),
        ([], {"temperature": 2.0}, ["temperature 0 in the checkpoint, 2 now"]),
        (
            [],
            {"geometry": ImageGeometry(codebook_size=7)},
            ["geometry.codebook_size 16384 in the checkpoint, 7 now"],
        ),
        (changed(weight=4), {}, ["source gen: weight 5 in the checkpoint, 4 now"]),
        (
            changed(schedule=(WeightPoint(at=120_000, weight=0, shape=Shape.linear),)),
            {},
            ["source gen: schedule none in the checkpoint, 0 from 120,000 (linear) now"],
        ),
        (
            changed(max_epochs=2.0, on_exhausted=Exhausted.stop),
            {},
            [
                "source gen: max_epochs 0 in the checkpoint, 2 now",
                "source gen: on_exhausted error in the checkpoint, stop now",
            ],
        ),
        (
            changed(lengths=short_sources()[1].lengths[:-5], num_images=short_sources()[1].num_images[:-5], digest="x"),
            {},
            [
                "source gen: other shards, 2,000 samples of manifest digest of ge in the checkpoint, "
                "1,995 samples of manifest x now"
            ],
        ),
        (
            changed(masks={"small": "a" * 64}, left_out=SOME),
            {},
            ["source gen: mask 'small' only now (0 left out in the checkpoint, 12 left out now)"],
        ),
        (
            changed(left_out=SOME),
            {},
            ["source gen: other samples are left out (0 left out in the checkpoint, 12 left out now)"],
        ),
        (short_sources()[:2], {}, ["source text: only in the checkpoint"]),
    ],
)
def test_a_change_is_told_with_both_values(sources, settings, lines):
    assert told(sources, **settings) == lines


def test_a_mask_that_was_made_anew():
    ours = plan_of(changed(masks={"small": "a" * 64}, left_out=SOME))
    theirs = plan_of(changed(masks={"small": "b" * 64}, left_out=np.roll(SOME, 1)))
    assert difference(ours.identity, theirs.identity) == [
        "source gen: mask 'small' was made anew (12 left out here, 12 left out there)"
    ]


def test_another_tokenizer_shows_as_other_lengths():
    lines = told(changed(lengths=short_sources()[1].lengths[::-1]))
    assert len(lines) == 1
    assert lines[0].startswith("source gen: tokens of its documents (tokenizer, template or geometry) ")


def test_captions_change_the_digest():
    numbers = np.arange(2000) % 2
    fields = {"caption_number": numbers, "uids": np.zeros((2000, 2), np.uint64)}
    lines = told(changed(captions=Captions.one, **fields))
    assert lines[0] == "source gen: captions all in the checkpoint, one now"
    assert plan_of(changed(**fields)).digest == plan_of(short_sources()).digest, "unused columns change nothing"


def test_an_unused_source_with_a_later_weight_changes_the_digest():
    later = (WeightPoint(at=5, weight=1),)
    assert told(changed(weight=0, schedule=later)) == [
        "source gen: schedule none in the checkpoint, 1 from 5 (step) now",
        "source gen: weight 5 in the checkpoint, 0 now",
    ]
    assert told(changed(weight=0)) == ["source gen: only in the checkpoint"]
    assert short_sources()[0].task is Task.understanding


def test_a_saved_identity_is_the_plans(tmp_path):
    plan = plan_of(changed(masks={"small": "a" * 64}, left_out=SOME, schedule=(WeightPoint(at=9, weight=1),)))
    save_identity(plan, tmp_path / IDENTITY_FILE)
    assert load_identity(tmp_path) == load_identity(tmp_path / IDENTITY_FILE)
    assert difference(load_identity(tmp_path), plan.identity) == []


def test_a_saved_identity_that_is_none_is_refused(tmp_path):
    path = tmp_path / IDENTITY_FILE
    with pytest.raises(UserError, match=r"plan.json: cannot be read \(No such file or directory\)"):
        load_identity(tmp_path)
    path.write_text("[1]")
    with pytest.raises(UserError, match="no saved plan"):
        load_identity(path)
    save_identity(plan_of(short_sources()), path)
    content = json.loads(path.read_text())
    content["identity"]["seed"] = 9
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged, its content has another digest"):
        load_identity(path)
