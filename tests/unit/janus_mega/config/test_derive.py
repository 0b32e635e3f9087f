"""Arithmetic at values that can be worked out by hand."""

import pytest

from janus_mega.config import derive
from janus_mega.config.load import load_config, load_section
from janus_mega.config.schema import ParallelConfig, RunConfig


def test_ranks_and_micro_batches():
    parallel = ParallelConfig(tp_size=4, pp_size=2, micro_batch_size=2)
    assert derive.dp_size(parallel, world_size=64) == 8
    assert derive.num_micro_batches(global_batch_size=128, micro_batch_size=2, dp_size=8) == 8


def test_vocabulary_padding():
    assert derive.padded_vocab_size(100_015, tp_size=1) == 100_096
    assert derive.padded_vocab_size(100_015, tp_size=8) == 100_352
    assert derive.padded_vocab_size(2048, tp_size=4, multiple=1) == 2048


def test_image_grids_of_the_papers():
    model = load_section(RunConfig, "model", "model/janus_1b.yaml")
    assert derive.understanding_grid(model.understanding) == derive.generation_grid(model.image_tokenizer) == 24
    assert derive.downsampling(model.image_tokenizer) == 16
    assert derive.image_geometry(model).generation_tokens == 576
    assert derive.head_dim(model.backbone) == 128
    assert derive.image_head_hidden_size(model) == 2048
    assert derive.encoder_ffn_size(model.understanding) == 4096


def test_a_stage_ends_at_its_stop():
    pro = load_config(RunConfig, "run/janus_pro_1b_stage2.yaml").config
    assert (pro.stage.num_steps, derive.last_step(pro.stage)) == (360_000, 270_000)
    assert derive.tokens_per_step(pro) == 512 * 4096


def test_shares_of_tasks_join_their_sources():
    config = load_config(
        RunConfig,
        "run/tiny_cpu.yaml",
        ["data.sources.text.weight=2", "data.sources.more.task=text", "data.sources.more.path=x"],
    ).config
    assert derive.task_shares(config) == pytest.approx({"text": 0.6, "understanding": 0.2, "generation": 0.2})


@pytest.mark.parametrize(("pp_size", "virtual_pp_size"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 3), (24, 1)])
def test_pipeline_ranks_carry_alike(pp_size, virtual_pp_size):
    """By what a mean position is multiplied with: the encoder before the first layer, the heads after the last."""
    model = load_section(RunConfig, "model", "model/janus_1b.yaml")
    counts = derive.layer_counts(model, ParallelConfig(pp_size=pp_size, virtual_pp_size=virtual_pp_size))
    assert len(counts) == pp_size * virtual_pp_size and min(counts) >= 1 and sum(counts) == 24
    layer = 2048 * (4 * 2048 + 3 * 5632)
    load = [count * layer for count in counts]
    load[0] += 0.15 * 24 * 1024 * (4 * 1024 + 2 * 4096)
    load[-1] += 0.35 * 2048 * 102400 + 0.45 * 2048 * (2048 + 16384)
    ranks = [sum(load[rank::pp_size]) for rank in range(pp_size)]
    assert max(ranks) - min(ranks) <= layer or pp_size == 24


def test_given_layers_of_the_pipeline_are_taken():
    model = load_section(RunConfig, "model", "model/janus_1b.yaml")
    assert derive.layer_counts(model, ParallelConfig(pp_size=2, pipeline_layers=[14, 10])) == (14, 10)
