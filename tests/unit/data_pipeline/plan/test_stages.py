"""The stages of the papers, planned: padding, balance of images, shares of tasks, memory, advice on row lengths.

`tools/measure_plan.py` measures the same over more windows, and what it costs.
"""

import tracemalloc
from functools import cache

import numpy as np
import pytest

from data_pipeline.plan.advise import advise_seq_len
from data_pipeline.plan.deal import deal_to_ranks
from data_pipeline.schema import TaskId
from data_pipeline.spec import DataSpec, Task
from tests.support.histograms import STAGES, plan_of, source, stage_sources

ROWS = 4096
PADDING = {
    "janus1": 0.001,
    "janus2": 0.001,
    "janus2_early": 0.004,
    "janus3": 0.001,
    "pro1": 0.0083,
    "pro2": 0.001,
    "pro3": 0.001,
}
"""Shares of all positions. Pro's stage I: no packing of these lengths leaves less than 0.0062 at 4160."""


def stage_plan(stage, rows=ROWS, global_batch_size=256):
    return plan_of(
        stage_sources(stage, scale=2.2 * rows / 4096),
        seq_len=STAGES[stage].seq_len,
        global_batch_size=global_batch_size,
        window_rows=rows,
    )


@cache
def second_window(stage):
    plan = stage_plan(stage)
    plan.window(0)
    return plan, plan.window(1)


@pytest.mark.parametrize("stage", STAGES)
def test_padding_of_every_stage(stage):
    plan, window = second_window(stage)
    assert 1 - window.length.sum() / (ROWS * plan.seq_len) <= PADDING[stage]


@pytest.mark.parametrize("stage", ["janus1", "pro1"])
def test_stage_one_is_padded_little_at_the_length_that_is_advised(stage):
    spec = DataSpec(seq_len=4096, window_rows=1024)
    near = [4032, 4096, 4160]
    advice = advise_seq_len(spec, stage_sources(stage, scale=0.6), 256, near)
    assert advice.advised == STAGES[stage].seq_len
    at = {row.seq_len: row.padding_fraction for row in advice.rows}
    assert at[4096] > 5 * at[advice.advised]


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_get_like_numbers_of_images(stage):
    _, window = second_window(stage)
    fullest = mean = 0.0
    for images in window.num_images.reshape(-1, 256):
        held = images[deal_to_ranks(images, 32, 8)].sum(axis=2)
        fullest += held.max(axis=0).sum()
        mean += held.mean(axis=0).sum()
    assert fullest <= 1.1 * mean


@pytest.mark.parametrize("global_batch_size", [128, 256, 512])
@pytest.mark.parametrize("stage", ["janus1", "janus2", "janus3", "pro3"])
def test_every_task_is_within_a_row_of_its_share_in_every_step(stage, global_batch_size):
    plan = stage_plan(stage, 1024, global_batch_size)
    window = plan.window(0)
    task = np.array([TaskId[taken.task.name] for taken in plan.sources])[window.source]
    step = np.repeat(np.arange(1024), np.diff(window.row_start)) // global_batch_size
    tokens = np.zeros((1024 // global_batch_size, len(TaskId)))
    np.add.at(tokens, (step, task), window.length)
    quota = tokens.sum(axis=0) / tokens.sum()
    assert np.abs(tokens - quota * tokens.sum(axis=1, keepdims=True)).max() <= plan.seq_len


def test_a_plan_takes_some_tens_of_bytes_a_sample():
    # 10 million samples must plan with less than 1 GiB, 107 bytes each; the window itself costs the same at any number.
    count = 400_000
    lengths = (np.arange(count) * 7919 % 300 + 600).astype(np.int32)
    sources = [source("drawings", Task.generation, 3, lengths), source("prose", Task.text, 1, lengths[::4] - 300)]
    tracemalloc.start()
    try:
        plan = plan_of(sources, seq_len=4096, global_batch_size=64, window_rows=256)
        plan.window(0)
        plan.window(1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - 8 * 2**20 <= 40 * (count + count // 4)
