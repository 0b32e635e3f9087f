"""What a run leaves behind of its data: hashes of every batch, broken samples, the plan, and where it ended."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UserError
from data_pipeline.plan.difference import load_identity
from data_pipeline.spec import Exhausted
from data_pipeline.stream.dataset import RowDataset
from data_pipeline.stream.quarantine import Quarantine, read_quarantine
from janus_mega.checkpoint.reader import open_checkpoint
from janus_mega.config.schema import LoggingConfig, OptimizerConfig, RunConfig, StageConfig
from janus_mega.parallel.groups import ProcessGroups, build_groups
from janus_mega.parallel.messages import gather_bytes_on_rank_0
from janus_mega.train import janus
from janus_mega.train.janus import train_janus
from janus_mega.train.watch import LONG_PHASE_FACTOR
from tests.support.full_disk import fill
from tests.support.ranks import import_what_ranks_need, results_of_ranks
from tests.support.shards import TinyShards, make_shards
from tests.support.tiny import STAGE3, fp32, tiny_model

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:This DataLoader will create")]

STEPS = 6
SPAN = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TinyShards:
    import_what_ranks_need()
    return make_shards(tmp_path_factory.mktemp("shards"))


def config_of(shards: TinyShards, run_dir: Path, **data: Any) -> RunConfig:
    model = tiny_model()
    model = replace(
        model,
        backbone=replace(model.backbone, vocab_size=512),
        image_tokenizer=replace(model.image_tokenizer, codebook_size=shards.spec.geometry.codebook_size),
    )
    return RunConfig(
        name="tiny",
        run_dir=str(run_dir),
        model=model,
        data=replace(shards.spec, **data),
        parallel=fp32(),
        optimizer=OptimizerConfig(lr=1e-3),
        stage=StageConfig(name="stage3", trainable=list(STAGE3), num_steps=STEPS, global_batch_size=SPAN),
        logging=LoggingConfig(log_every=4, tensorboard=False),
    )


def train(config: RunConfig, world_size: int = 1) -> str:
    """The name of the last checkpoint, or what a user is told, rank 0's word."""
    return results_of_ranks(_train, world_size, config)[0]


def _train(config: RunConfig) -> str:
    try:
        return train_janus(config).name
    except UserError as error:
        return f"refused: {error}"


def logged(run_dir: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (run_dir / "batches.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["batch_hash"] for line in lines}


def test_the_log_holds_the_hash_of_every_batch_also_across_a_resume(shards: TinyShards, run_dir: Path) -> None:
    config = config_of(shards, run_dir)
    assert train(replace(config, stage=replace(config.stage, stop_at_step=3))) == "step-00000003"
    assert open_checkpoint(run_dir / "checkpoints" / "step-00000003").read_state().data_cursor["plan"]
    assert train(replace(config, data=replace(config.data, num_workers=1)), world_size=2) == "step-00000006"
    rows = RowDataset(shards.open(global_batch_size=SPAN))
    assert logged(run_dir) == {step: rows.step_hash(step - 1) for step in range(1, STEPS + 1)}


def test_another_plan_is_refused_with_what_differs(shards: TinyShards, run_dir: Path) -> None:
    config = config_of(shards, run_dir)
    config = replace(config, stage=replace(config.stage, stop_at_step=1))
    train(config)
    assert load_identity(run_dir) == shards.open(global_batch_size=SPAN).plan.identity
    sources = {**config.data.sources, "text": replace(config.data.sources["text"], weight=4.0)}
    answer = train(replace(config, data=replace(config.data, sources=sources, seed=7)))
    assert answer.startswith("refused: ") and "\n" not in answer
    assert "seed" in answer and "text" in answer and "4" in answer


def broken_shards(path: Path) -> TinyShards:
    """Shards of which one question, trained on in the third step, is not what it was."""
    shards = make_shards(path)
    data = shards.open(global_batch_size=SPAN)
    number = [source.name for source in data.plan.sources].index("questions")
    documents = (document for row in range(2 * SPAN, 3 * SPAN) for document in data.plan.row(row))
    sample = next(document.sample_no for document in documents if document.source_no == number)
    source = data.sources[number]
    tar = source.shard_path(source.place_of(sample)[0])
    content = bytearray(tar.read_bytes())
    content[int(source.offset[sample]) + 520] ^= 1
    tar.write_bytes(content)
    return shards


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_broken_sample_is_recorded_and_training_goes_on(world_size: int, tmp_path: Path, run_dir: Path) -> None:
    shards = broken_shards(tmp_path)
    assert train(config_of(shards, run_dir), world_size) == "step-00000006"
    (hole,) = read_quarantine(run_dir)
    assert (hole.source, hole.reason) == ("questions", "checksum")
    assert hole.step == 3
    rows = RowDataset(shards.open(global_batch_size=SPAN))
    assert logged(run_dir)[hole.step] == rows.step_hash(hole.step - 1)


def test_more_broken_samples_than_the_budget_stop_all_ranks(tmp_path: Path, run_dir: Path) -> None:
    answers = results_of_ranks(_train, 2, config_of(broken_shards(tmp_path), run_dir, max_broken_samples=0))
    assert all(answer.startswith("refused: ") for answer in answers)
    assert "max_broken_samples=0" in answers[0] and "data verify" in answers[0]
    assert len(read_quarantine(run_dir)) == 1


def test_a_source_too_small_for_its_share_is_refused_before_training(shards: TinyShards, run_dir: Path) -> None:
    sources = {**shards.spec.sources, "questions": replace(shards.spec.sources["questions"], max_epochs=0.1)}
    answer = train(config_of(shards, run_dir, sources=sources))
    assert answer.startswith("refused: ") and "questions" in answer and "max_epochs" in answer
    assert not (run_dir / "checkpoints").exists()


def test_a_plan_that_ends_ends_the_run(shards: TinyShards, run_dir: Path) -> None:
    questions = replace(shards.spec.sources["questions"], max_epochs=2, on_exhausted=Exhausted.stop)
    config = config_of(shards, run_dir, sources={**shards.spec.sources, "questions": questions}, window_rows=SPAN)
    config = replace(config, stage=replace(config.stage, num_steps=200))
    last = train(config)
    assert last.startswith("step-") and 0 < int(last[5:13]) < 200
    assert train(config) == last
    assert sorted(logged(run_dir)) == list(range(1, int(last[5:13]) + 1))


def test_a_full_disk_costs_the_log_and_no_run(shards: TinyShards, run_dir: Path) -> None:
    fill(run_dir / "batches.jsonl")
    assert results_of_ranks(_train, 2, config_of(shards, run_dir)) == ["step-00000006"] * 2


def test_a_quarantine_that_cannot_be_written_ends_no_run(
    shards: TinyShards, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Quarantine.add

    def add_and_refuse(self: Quarantine, holes: Any) -> None:
        add(self, holes)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Quarantine, "add", add_and_refuse)
    assert train(config_of(shards, run_dir)) == "step-00000006"


def timeouts_of(config: RunConfig) -> list[float]:
    """That training gives the world and the groups it is cut into."""
    told: list[float] = []
    join, build = janus.init_distributed, janus.build_groups

    def note_join(timeout_s: float) -> None:
        told.append(timeout_s)
        join(timeout_s)

    def note_build(*arguments: Any) -> ProcessGroups:
        told.append(arguments[-1])
        return build(*arguments)

    janus.init_distributed, janus.build_groups = note_join, note_build
    train_janus(config)
    return told


def test_collectives_of_a_run_outlast_its_watchdog(shards: TinyShards, run_dir: Path) -> None:
    config = config_of(shards, run_dir)
    config = replace(config, health=replace(config.health, hang_timeout_s=6000.0))
    ((of_world, of_groups),) = results_of_ranks(timeouts_of, 1, config)
    assert min(of_world, of_groups) > LONG_PHASE_FACTOR * 6000.0


def test_only_the_first_rank_gets_what_all_tell() -> None:
    def gather() -> list[list[str]]:
        groups = build_groups(1, 1)
        rank = groups.layout.rank
        told = (b"ab" * rank, b"", b"x" if rank == 0 else b"")
        return [[part.decode() for part in gather_bytes_on_rank_0(content, groups)] for content in told]

    first, *others = results_of_ranks(gather, 3)
    assert first == [["", "ab", "abab"], [""] * 3, ["x", "", ""]]
    assert others == [[[], [], []]] * 2
