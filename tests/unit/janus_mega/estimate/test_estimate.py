"""Estimates of published configurations: shapes agree with counts, layouts rank sensibly, the command answers."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from data_pipeline.errors import UserError
from janus_mega.cli.main import app
from janus_mega.config.load import load_config
from janus_mega.config.schema import ParallelConfig, RunConfig
from janus_mega.estimate.gpus import gpu_of
from janus_mega.estimate.memory import ZERO3_LIVE, micro_batches_in_flight
from janus_mega.estimate.run import bubble_fraction, estimate, ranked
from janus_mega.estimate.shape import rank_shapes
from janus_mega.estimate.traffic import DEEPSPEED_BUCKET, ZERO3_PERSISTENT, ZERO3_PREFETCH
from janus_mega.models.count import total_parameters

STAGE2 = "configs/run/janus_pro_7b_stage2.yaml"
H100 = gpu_of("h100-80")


def config_of(*overrides: str) -> RunConfig:
    return load_config(RunConfig, STAGE2, list(overrides)).config


def test_pipeline_ranks_hold_the_whole_model_between_them():
    config = config_of("parallel.tp_size=1", "parallel.pp_size=4", "parallel.sequence_parallel=false")
    assert sum(shape.weights for shape in rank_shapes(config)) == total_parameters(config.model)


def test_sizes_of_tensors_add_up_to_counts():
    for words in ((), ("parallel.tp_size=1", "parallel.sequence_parallel=false", "parallel.pp_size=2")):
        for shape in rank_shapes(config_of(*words)):
            assert sum(shape.tensors) == shape.weights


def test_zero_spreads_optimizer_state_and_stage_3_the_weights():
    base = ("parallel.tp_size=1", "parallel.sequence_parallel=false")
    memory = {
        stage: estimate(config_of(*base, f"parallel.zero_stage={stage}"), 64, H100, 0.4).ranks[0].memory
        for stage in (1, 2, 3)
    }
    assert memory[1].moments == memory[3].moments
    assert memory[2].gradients * 63 < memory[1].gradients
    assert memory[3].weights * 63 < memory[1].weights


@pytest.mark.parametrize(
    ("zero_stage", "precision", "per_element"), [(1, "bf16", 0), (2, "bf16", 2 + 4), (2, "fp32", 4), (3, "bf16", 4 + 4)]
)
def test_a_bucket_is_reduced_beside_a_copy(zero_stage: int, precision: str, per_element: int):
    """ZeRO-3 sorts it by rank, bf16 is summed in fp32; a 7B model fills many before its backward pass is over."""
    words = ("parallel.tp_size=1", "parallel.sequence_parallel=false", f"parallel.zero_stage={zero_stage}")
    config = config_of(*words, f"parallel.precision={precision}")
    memory = estimate(config, 64, H100, 0.4).ranks[0].memory
    small = sum(size for size in rank_shapes(config)[0].tensors if size <= ZERO3_PERSISTENT) if zero_stage == 3 else 0
    assert memory.buckets == per_element * DEEPSPEED_BUCKET + 2 * small
    assert memory.gathered == (2 * (ZERO3_LIVE + ZERO3_PREFETCH) if zero_stage == 3 else 0)


@pytest.mark.parametrize(
    ("pp_size", "virtual", "bubble", "in_flight"), [(1, 1, 0, 1), (4, 1, 3 / 11, 4), (4, 2, 3 / 19, 5.5)]
)
def test_interleaving_halves_the_bubble_and_holds_more(pp_size, virtual, bubble, in_flight):
    parallel = ParallelConfig(pp_size=pp_size, virtual_pp_size=virtual)
    assert bubble_fraction(parallel, 8) == pytest.approx(bubble)
    config = config_of(f"parallel.pp_size={pp_size}", f"parallel.virtual_pp_size={virtual}")
    assert micro_batches_in_flight(config, 0, 8) == in_flight


def test_what_is_ranked_fits_and_is_sorted():
    found = ranked(config_of(), 64, H100, 0.4)
    assert found
    assert all(one.fits(H100) for one in found)
    seconds = [round(one.step_s, 6) for one in found]
    assert seconds == sorted(seconds)


def test_the_command_tells_and_refuses():
    told = CliRunner().invoke(app, ["estimate", STAGE2, "--gpus", "256", "--json"])
    report = json.loads(told.stdout)
    assert report["fits"] is True
    assert report["ranks"][0]["memory"]["peak"] > report["ranks"][0]["memory"]["weights"] > 10**9
    for words in (["--gpu", "abacus"], ["--mfu", "2"], ["--gpus", "0"]):
        refused = CliRunner().invoke(app, ["estimate", STAGE2, *words])
        assert isinstance(refused.exception, UserError)


def test_estimating_needs_no_torch():
    program = "import sys, janus_mega.estimate.run, janus_mega.cli.estimate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
