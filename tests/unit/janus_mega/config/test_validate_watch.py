"""Rules of what watches a run: each is broken once, and what is legal next to it passes."""

import pytest

from janus_mega.config.load import load_config
from janus_mega.config.schema import RunConfig
from janus_mega.config.validate import run_problems

SET = "validation.sets.held_out.num_rows=4"


def problems(*overrides: str, world_size: int = 1) -> list[str]:
    return list(run_problems(load_config(RunConfig, "run/tiny_cpu.yaml", overrides).config, world_size))


@pytest.mark.parametrize(
    "overrides",
    [
        ["validation.every=5", SET],
        ["validation.every=5", SET, "validation.sets.held_out.sources=[text]", "data.sources.text.weight=0"],
        ["logging.profile_steps=[2,3]", "logging.monitor_every=7", "logging.gc_every=100", "logging.peak_flops=989e12"],
        ["samples.every=9", "samples.captions=[the one]", "data.image_tokenizer=somewhere"],
    ],
)
def test_legal_watching_passes(overrides: list[str]) -> None:
    assert problems(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["validation.every=5"], ["validation.sets is empty", "num_rows"]),
        (["validation.every=-1"], ["validation.every -1"]),
        (["validation.every=5", "validation.sets.a.num_rows=3"], ["validation.sets.a.num_rows 3", "multiple of 2"]),
        ([SET, "validation.sets.held_out.sources=[txet]"], ["held_out.sources names txet", "text", "weight 0"]),
        (["logging.profile_steps=[3]"], ["profile_steps [3]", "first and the last"]),
        (["logging.profile_steps=[3,2]"], ["profile_steps [3, 2]"]),
        (["logging.monitor_every=-1"], ["monitor_every -1 must be 0 (never) or more"]),
        (["logging.monitor_every=9", "parallel.compile=true"], ["monitor_every 9", "parallel.compile"]),
        (["logging.gc_every=-2"], ["gc_every -2"]),
        (["logging.peak_flops=-1"], ["peak_flops -1"]),
        (["samples.every=5", "data.image_tokenizer=somewhere"], ["nothing to show", "samples.captions"]),
        (
            ["samples.every=5", "samples.captions=[one]", "data.image_tokenizer=''"],
            ["data.image_tokenizer", "samples.every to 0"],
        ),
        (["samples.max_new_tokens=0"], ["max_new_tokens 0"]),
        (
            ["samples.every=5", "samples.captions=[one]", "data.image_tokenizer=x", "model.backbone.qk_norm=true"],
            ["qk_norm", "samples.every to 0"],
        ),
    ],
)
def test_each_rule_speaks(overrides: list[str], words: list[str]) -> None:
    (problem,) = problems(*overrides)
    assert all(word in problem for word in words), problem
