"""Sources as the plan sees them, with lengths drawn from the shapes that real data has."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.plan.documents import PlanSource
from data_pipeline.plan.plan import Plan, compile_plan
from data_pipeline.spec import DataSpec, RatioUnit, Task


def source(name, task, weight, lengths, images=None, can_cut=False):
    lengths = np.asarray(lengths, np.int32)
    return PlanSource(
        name=name,
        digest=f"digest of {name}",
        task=task,
        weight=weight,
        lengths=lengths,
        num_images=np.zeros(len(lengths), np.uint8) if images is None else np.asarray(images, np.uint8),
        can_cut=can_cut,
    )


def short_sources(seed=0, text=True, scale=1):
    """Small pictures, short questions, drawings with a caption, docstrings: 4 to some hundred tokens."""
    random = np.random.default_rng(seed)
    und_images = 1 + (random.random(1200 * scale) < 0.3)
    sources = [
        source("und", Task.understanding, 2, 18 * und_images + random.integers(9, 20, 1200 * scale), und_images),
        source("gen", Task.generation, 5, random.integers(28, 35, 2000 * scale)),
    ]
    if text:
        lengths = np.maximum(random.lognormal(4.3, 0.9, 900 * scale).astype(int), 4)
        sources.append(source("text", Task.text, 3, lengths, can_cut=True))
    return sources


def long_sources(mix="stage2", seed=0):
    """Images of 576 tokens: captions, interleaved documents, drawings, prose with a long tail."""
    random = np.random.default_rng(seed)
    caption = 578 + np.maximum(random.lognormal(5.1, 0.35, 20000).astype(int), 10)
    images = 1 + random.poisson(1.5, 20000)
    interleaved = 578 * images + np.maximum(random.lognormal(6.3, 0.8, 20000).astype(int), 20)
    fits = interleaved <= 4096
    drawing = 578 + np.where(random.random(40000) < 0.5, random.poisson(15, 40000), random.poisson(105, 40000))
    prose = np.maximum(random.lognormal(6.2, 1.0, 30000).astype(int), 8)
    weights = {"stage1": (1, 0, 1, 0), "stage2": (1, 1, 5, 3), "stage3": (7, 0, 10, 3)}[mix]
    return [
        source("captions", Task.understanding, weights[0], caption, np.ones(20000)),
        source("interleaved", Task.understanding, weights[1], interleaved[fits], images[fits]),
        source("drawings", Task.generation, weights[2], drawing),
        source("prose", Task.text, weights[3], prose, can_cut=True),
    ]


@dataclass(frozen=True)
class StageMix:
    """One stage of the papers: shares of tokens, and the rows per step it trained with."""

    shares: dict[str, float]
    """By kind of document, see `_LENGTHS`."""
    global_batch_size: int
    seq_len: int = 4096
    """Stage I: what `advise_seq_len` advises who asks for 4096; a test holds them together."""


STAGES = {
    "janus1": StageMix({"captions": 1, "class_names": 1}, 256, seq_len=4032),
    "janus2": StageMix({"captions": 1, "interleaved": 1, "prose": 3, "drawings": 5}, 512),
    "janus2_early": StageMix({"captions": 1, "interleaved": 1, "prose": 3, "class_names": 5}, 512),
    "janus3": StageMix({"questions": 3, "conversations": 4, "prose": 3, "drawings": 10}, 256),
    "pro1": StageMix({"captions": 1, "class_names": 3}, 256, seq_len=4160),
    "pro2": StageMix({"captions": 1, "interleaved": 1, "prose": 3, "drawings": 5}, 512),
    "pro3": StageMix({"questions": 2, "conversations": 3, "prose": 1, "drawings": 4}, 128),
}
"""The six stages (understanding : text : drawing is 1:0:1, 2:3:5, 7:3:10 and 1:0:3, 2:3:5, 5:1:4), and the first two
thirds of Janus's stage II, which drew ImageNet alone. Understanding is split where a stage names several kinds."""

_READ = 587
"""Tokens of an understanding document beside question and answer: its image block, template, bos, eos."""
_DRAWN = 584
"""Tokens of a drawing beside its caption."""


def _lognormal(random, mean, sigma, count, least):
    return np.maximum(random.lognormal(np.log(mean) - sigma * sigma / 2, sigma, count).astype(np.int64), least)


def _half(random, count, one, other):
    return np.where(random.random(count) < 0.5, one, other)


def _interleaved(random, count):
    images = 1 + random.poisson(1.5, count)
    return 2 + 578 * images + _lognormal(random, 815, 0.8, count, 20), images


_LENGTHS = {
    "class_names": lambda random, count: (_DRAWN + 1 + random.poisson(2.5, count), 0),
    "drawings": lambda random, count: (
        _DRAWN + _half(random, count, _lognormal(random, 15, 0.4, count, 3), _lognormal(random, 105, 0.3, count, 20)),
        0,
    ),
    "captions": lambda random, count: (_READ + 10 + _lognormal(random, 190, 0.35, count, 20), 1),
    "questions": lambda random, count: (_READ + 10 + _lognormal(random, 12, 0.5, count, 2), 1),
    "conversations": lambda random, count: (_READ + 20 + _lognormal(random, 180, 0.7, count, 10), 1),
    "interleaved": _interleaved,
    "prose": lambda random, count: (_lognormal(random, 800, 1.0, count, 8), 0),
}
_TASKS = {"class_names": Task.generation, "drawings": Task.generation, "prose": Task.text}


def stage_sources(stage, *, scale=1.0, seed=0):
    """The sources of one of the papers' stages; `scale` 1 is a window of 4096 rows of 4096 with something to spare.

    Documents other than prose that are longer than 4096 are left out, as when preparing.
    """
    shares = STAGES[stage].shares
    sources = []
    for name, share in shares.items():
        random = np.random.default_rng([seed, len(name), ord(name[0])])
        lengths, images = _LENGTHS[name](random, int(scale * 40000 * share / sum(shares.values())) + 64)
        images = np.broadcast_to(images, lengths.shape)
        fits = (lengths <= 4096) | (name == "prose")
        task = _TASKS.get(name, Task.understanding)
        sources.append(source(name, task, share, lengths[fits], images[fits], can_cut=name == "prose"))
    return sources


def plan_of(sources, *, seq_len=256, global_batch_size=16, window_rows=128, **changes) -> Plan:
    changes = {"ratio_unit": RatioUnit.tokens, **changes}
    spec = DataSpec(seq_len=seq_len, window_rows=window_rows, **changes)
    return compile_plan(spec, sources, global_batch_size=global_batch_size)
