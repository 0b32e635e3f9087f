"""Sources as the plan sees them, with lengths drawn from the shapes that real data has."""

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


def plan_of(sources, *, seq_len=256, global_batch_size=16, window_rows=128, **changes) -> Plan:
    changes = {"ratio_unit": RatioUnit.tokens, **changes}
    spec = DataSpec(seq_len=seq_len, window_rows=window_rows, **changes)
    return compile_plan(spec, sources, global_batch_size=global_batch_size)
