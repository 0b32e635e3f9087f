"""Chains of stages: what a dry run says, what is refused, and two real stages one after the other."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.config.load import config_root, load_config, save
from janus_mega.config.schema import Module, OptimizerConfig, RunConfig, StageConfig
from janus_mega.config.schema_stages import Border, StageLink, StagesConfig
from janus_mega.models.count import module_parameters
from janus_mega.parallel.slices import whole
from janus_mega.train import stages
from janus_mega.train.exits import RunEnded
from janus_mega.train.stages import describe_stages, parameters_by_rank, plan_stages, run_stages, slurm_lines
from tests.support.shards import make_shards
from tests.support.tiny import STAGE1, STAGE3, fp32, tiny_model

pytestmark = pytest.mark.dist

CHAINS = sorted(path.name for path in (config_root() / "chain").glob("*.yaml"))


def load_chain(name: str, *overrides: str) -> StagesConfig:
    return load_config(StagesConfig, f"chain/{name}", overrides).config


@pytest.mark.parametrize("name", CHAINS)
def test_shipped_chains(name: str) -> None:
    planned = plan_stages(load_chain(name))
    assert [stage.name for stage in planned] == ["stage1", "stage2", "stage3"]
    assert planned[0].config.stage.init_from.endswith("parts")
    for before, after in pairwise(planned):
        assert after.config.stage.init_from == str(before.root / f"step-{before.last_step:08d}")
        assert set(before.config.stage.trainable) < set(after.config.stage.trainable)


def test_a_dry_run_tells_what_trains_where() -> None:
    chain = load_chain("janus_pro_7b.yaml", "overrides=[parallel.pp_size=2,optimizer.lr_scales.image_head=0.5]")
    parts = "\n".join(describe_stages(plan_stages(chain))).split("\n\n")
    assert "layout     tp 4 x pp 2 x dp 32" in parts[0] and "270000 of 360000 planned" in parts[1]
    rows = {line.split()[0]: line.split()[1:] for line in parts[0].splitlines()}
    assert rows["image_head"] == ["0.0005", "-", "83,906,560"]
    assert rows["text_head"][0] == "frozen" and rows["understanding_adaptor"] == ["0.001", "20,979,712", "-"]
    assert rows["trained"] == [f"{20_979_712 + 131_072 + 16_818_176:,}", "83,906,560"]
    assert "understanding 20%, text 30%, generation 50%" in parts[1]


def test_a_dry_run_tells_what_becomes_of_the_optimizer() -> None:
    told = list(describe_stages(plan_stages(load_chain("janus_1b.yaml"))))
    assert [line for line in told if line.startswith("  optimizer")] == ["  optimizer  fresh"] * 3
    planned = plan_stages(load_chain("janus_1b.yaml", "overrides=[stage.optimizer_state=carry]"))
    lines = [line for line in describe_stages(planned) if line.startswith("  optimizer")]
    assert lines[0] == "  optimizer  carried where parameters trained before"
    here, before = (planned[number].config.stage.trainable for number in (1, 0))
    new = ", ".join(module.value for module in here if module not in before)
    carried = ", ".join(module.value for module in here if module in before)
    assert lines[1] == f"  optimizer  carried for {carried}, fresh for {new}"


def test_every_parameter_lives_on_one_rank() -> None:
    overrides = ["parallel.pp_size=2", "parallel.virtual_pp_size=3"]
    config = load_config(RunConfig, "run/janus_1b_stage3.yaml", overrides).config
    counts = {module: sum(ranks) for module, ranks in parameters_by_rank(config).items()}
    assert counts == module_parameters(config.model)
    assert all(parameters_by_rank(config)[Module.backbone])


def test_slurm_commands_wait_for_each_other() -> None:
    first, second, _ = slurm_lines(plan_stages(load_chain("janus_1b.yaml")))
    assert "dependency" not in first and "--ntasks=128" in first
    assert "slurm/train.sbatch run/janus_1b_stage1.yaml" in first
    assert "--dependency=afterok:$job1 --kill-on-invalid-dep=yes" in second
    assert "stage.init_from=runs/janus_1b/stage1/checkpoints/step-00010000" in second


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ({}, "names no stage"),
        ({"a": StageLink(config="run/janus_1b_stage1.yaml", starts_from=Border.previous)}, "a is first"),
        (
            {"a": StageLink(config="run/janus_1b_stage1.yaml"), "b": StageLink(config="run/janus_1b_stage1.yaml")},
            "a and b share run_dir",
        ),
        (
            {"a": StageLink(config="run/janus_1b_stage1.yaml"), "b": StageLink(config="run/janus_pro_7b_stage1.yaml")},
            "b has another model than a",
        ),
    ],
)
def test_chains_that_are_refused(links: dict[str, StageLink], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_stages(StagesConfig(family="wrong", ranks=128, stages=links))


@pytest.mark.parametrize(("code", "told"), [(75, 75), (86, 86), (1, 1), (-9, 137), (0, 1)])
def test_the_chain_ends_as_its_stage_ended(monkeypatch: pytest.MonkeyPatch, code: int, told: int) -> None:
    monkeypatch.setattr(stages, "_code_of", lambda command: code)
    with pytest.raises(RunEnded, match=f"ended with code {code} at step 0 of 10000; the same command") as ended:
        list(run_stages(plan_stages(load_chain("janus_1b.yaml"))))
    assert ended.value.exit_code == told


def test_bad_input_of_a_stage_is_bad_input_of_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_code_of", lambda command: 2)
    with pytest.raises(UserError, match="stage1: .* ended with code 2 .*correct what it says"):
        list(run_stages(plan_stages(load_chain("janus_1b.yaml"))))


@pytest.mark.slow
def test_two_stages_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    shards = make_shards(tmp_path / "shards")
    model = tiny_model()
    model = replace(
        model,
        backbone=replace(model.backbone, vocab_size=512),
        image_tokenizer=replace(model.image_tokenizer, codebook_size=shards.spec.geometry.codebook_size),
    )
    links = {}
    for name, trainable in (("one", STAGE1), ("two", STAGE3)):
        config = RunConfig(
            name=name,
            run_dir=str(tmp_path / name),
            model=model,
            data=shards.spec,
            parallel=replace(fp32(), torch_threads=1),
            optimizer=OptimizerConfig(lr=1e-3),
            stage=StageConfig(name=name, trainable=list(trainable), num_steps=9, stop_at_step=2, global_batch_size=2),
        )
        save(config, tmp_path / f"{name}.yaml")
        border = Border.previous if name == "two" else Border.as_configured
        links[name] = StageLink(config=str(tmp_path / f"{name}.yaml"), starts_from=border)
    planned = plan_stages(StagesConfig(family="tiny", stages=links))
    assert list(run_stages(planned)) == ["one: from step 0 to 2", "two: from step 0 to 2"]
    assert list(run_stages(planned)) == ["one: done, 2 steps", "two: done, 2 steps"]
    assert [stage.reached_step() for stage in planned] == [2, 2]
    one, two = (open_checkpoint(found) for stage in planned if (found := stage.final()) is not None)
    name = "image_head.fc1.weight"
    box = whole(one.shape(name))
    moved = (two.read_box(name, box) - one.read_box(name, box)).abs().max().item()
    assert 0 < moved <= 2.5e-3  # two updates of at most the rate away from where the first stage ended
    kept = json.loads((tmp_path / "two/attempts/0001/command.json").read_text(encoding="utf-8"))
    assert kept["outcome"] == "finished" and kept["argv"][1] == "train"
