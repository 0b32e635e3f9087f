"""verify-layout: shrunken configurations of the papers' stages on synthetic rows, and layouts that train wrong."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from janus_mega.cli.main import app
from janus_mega.config.load import load_config
from janus_mega.config.schema import RunConfig
from janus_mega.config.validate import validate_run
from janus_mega.parallel import replicated
from janus_mega.parallel.slices import Slice
from janus_mega.train import layout_check
from janus_mega.train.check_rows import SyntheticWorkload
from janus_mega.train.exits import RunEnded, exit_code_of
from janus_mega.train.layout_check import BARS, Verdict, verify_layout
from janus_mega.train.layout_trace import Trace, deviations
from janus_mega.train.shrunk import shrink
from tests.support.ranks import import_what_ranks_need, results_of_ranks

pytestmark = pytest.mark.dist

TP2_SP = ["parallel.tp_size=2", "parallel.sequence_parallel=true"]


def load(stage: int, *overrides: str) -> RunConfig:
    return load_config(RunConfig, f"run/janus_pro_1b_stage{stage}.yaml", overrides).config


def verify(path: Path, config: RunConfig, world_size: int, **options) -> Verdict:
    import_what_ranks_need()
    return verify_layout(config, world_size, path, **options)


@pytest.mark.parametrize(
    ("stage", "world_size", "overrides"),
    [
        (3, 4, ["parallel.pp_size=2", "parallel.virtual_pp_size=2", "parallel.recompute=full"]),
        (1, 4, [*TP2_SP, "parallel.pp_size=2", "parallel.backend=megatron"]),
        (2, 2, ["parallel.zero_stage=3", "loss.normalization=per_task", "parallel.micro_batch_size=2"]),
    ],
    ids=["interleaved", "megatron", "zero3"],
)
def test_layouts_are_equal(stage: int, world_size: int, overrides: list[str], tmp_path: Path, record_property) -> None:
    verdict = verify(tmp_path, load(stage, *overrides), world_size)
    record_property("worst", str(verdict.worst))
    assert verdict.passed, verdict.worst
    assert len(verdict.found["losses"]) == verdict.num_steps == 5
    assert all(math.isfinite(loss) and loss > 1 for loss in verdict.found["losses"])


def test_the_command_fails_a_layout_that_trains_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property
) -> None:
    monkeypatch.setattr(replicated, "REPLICATED_RULES", ())  # the ranks are forks of this process
    import_what_ranks_need()
    found = tmp_path / "found.json"
    options = ["--ranks", "2", "--steps", "2", "--json", str(found)]
    result = CliRunner().invoke(app, ["verify-layout", "run/janus_pro_1b_stage3.yaml", *TP2_SP, *options])
    assert result.exit_code == 1, result.output
    assert "NOT EQUAL" in result.output and "<-- OFF" in result.output
    values = json.loads(found.read_text(encoding="utf-8"))
    record_property("over_bar", values["worst"]["norm"]["value"] / BARS["norm"])
    assert not values["passed"] and values["worst"]["loss"]["value"] <= BARS["loss"]  # the first loss shows nothing
    assert values["worst"]["norm"]["value"] >= 5 * BARS["norm"]
    assert values["worst"]["modules"]["name"] == "backbone"


def test_a_rank_that_crashes_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: object) -> None:
        raise RuntimeError("a defect of one rank")

    monkeypatch.setattr(layout_check, "trace_steps", crash)  # the ranks are forks of this process
    import_what_ranks_need()
    result = CliRunner().invoke(app, ["verify-layout", "run/janus_pro_1b_stage3.yaml", "--ranks", "2"])
    assert isinstance(result.exception, RunEnded) and exit_code_of(result.exception) == 1
    line = str(result.exception)
    assert "\n" not in line and "rank 0 failed: RuntimeError: a defect of one rank" in line
    kept = Path(line.rsplit(" ", 1)[-1])
    assert "Traceback" in kept.read_text(encoding="utf-8")
    kept.unlink()


def test_ranks_must_fit_the_layout() -> None:
    result = CliRunner().invoke(app, ["verify-layout", "run/janus_pro_1b_stage3.yaml", *TP2_SP, "--ranks", "3"])
    assert "3 ranks cannot be cut into tp_size 2 x pp_size 1" in str(result.exception)


def _deviations_of(case: str) -> dict[str, float]:
    weights = {"a": torch.ones(4), "b": torch.ones(2)}
    trace = Trace([1.0, 2.0], [1.0, math.nan if case == "nan" else 1.0], {"backbone": [1.0, 0.0]})
    expected = Trace([1.0, 2.0], [1.0, 1.0], {"backbone": [1.0, 1e-9]})
    pieces = [Slice("a", (4,), (0,), torch.ones(3 if case == "missing" else 4)), Slice("b", (2,), (0,), torch.ones(2))]
    off = deviations(trace, pieces, expected, weights, torch.device("cpu"))
    return {"norm": off.norm, "module": off.modules["backbone"], **off.weights}


def test_what_is_missing_or_no_number_is_infinitely_off() -> None:
    (fine,) = results_of_ranks(_deviations_of, 1, "fine")
    assert fine == {"norm": 0.0, "module": 1e-9, "a": 0.0, "b": 0.0}  # against the module's largest gradient
    (nan,) = results_of_ranks(_deviations_of, 1, "nan")
    assert nan["norm"] == math.inf
    (missing,) = results_of_ranks(_deviations_of, 1, "missing")
    assert (missing["a"], missing["b"]) == (math.inf, 0.0)


@pytest.mark.parametrize(
    ("stage", "overrides", "dp_size"),
    [
        (1, [], 2),
        (1, ["parallel.tp_size=8", "parallel.sequence_parallel=true", "parallel.pp_size=2"], 3),
        (2, ["parallel.pp_size=4", "parallel.virtual_pp_size=3", "parallel.micro_batch_size=4"], 2),
        (3, ["parallel.pp_size=2", "parallel.pipeline_layers=[10,14]"], 1),
    ],
)
def test_a_shrunken_configuration_is_valid(stage: int, overrides: list[str], dp_size: int) -> None:
    config = load(stage, *overrides)
    small = shrink(config, dp_size)
    validate_run(small, config.parallel.tp_size * config.parallel.pp_size * dp_size)
    assert small.model.backbone.hidden_size <= 256 and small.model.backbone.num_layers <= 24
    changed = {name for name in small.parallel.__dataclass_fields__ if _differs(small, config, name)}
    assert changed <= {"precision", "pipeline_layers", "torch_threads", "check_calls"}
    assert small.stage.trainable == config.stage.trainable


def _differs(a: RunConfig, b: RunConfig, name: str) -> bool:
    return getattr(a.parallel, name) != getattr(b.parallel, name)


def test_synthetic_rows_hold_the_hard_cases_and_do_not_depend_on_dp() -> None:
    workload = SyntheticWorkload(shrink(load(3, "parallel.micro_batch_size=2"), dp_size=2))
    whole = list(workload.batches(0, 1, 0, 5))
    halves = [list(workload.batches(rank, 2, 0, 5)) for rank in range(2)]
    for step, batches in enumerate(whole):
        ids = torch.cat([batch["input_ids"] for batch in batches])
        assert torch.equal(ids, torch.cat([batch["input_ids"] for half in halves for batch in half[step]]))
    images = [[sum(len(batch["pixel_values"]) for batch in half[step]) for half in halves] for step in range(5)]
    assert [[count > 0 for count in of_step] for of_step in images] == [
        [True, True],
        [True, False],  # one dp rank has nothing to understand
        [False, False],
        [False, False],
        [True, True],
    ]
    counts = [sum(workload.count_labels(batch) for batch in batches).tolist() for batches in whole]
    assert counts[2][1] == counts[2][2] == 0 < counts[2][0]  # text only
    assert counts[3][1] == 0 < counts[3][2]
    assert counts[4][0] == counts[4][2] == 0 < counts[4][1]  # understanding only


def test_the_shrunken_optimizer_keeps_what_the_run_has() -> None:
    config = load(3)
    config = replace(config, optimizer=replace(config.optimizer, lr_scales={"image_head": 0.1}))
    optimizer = shrink(config, 1).optimizer
    assert optimizer.lr_scales == {"image_head": 0.1}
    assert (optimizer.weight_decay, optimizer.clip_grad_norm) == (
        config.optimizer.weight_decay,
        config.optimizer.clip_grad_norm,
    )
    assert layout_check.describe(config.parallel, 4).startswith("tp 1 x pp 1 x dp 4")
