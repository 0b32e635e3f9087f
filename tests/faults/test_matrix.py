"""Every fault on the first and the last rank in every phase: the start ends as promised, the next one makes it good.

A run of two ranks stands at step 2 and goes on to step 6; the fault strikes at step 4, or while the run comes up. What
must hold for each cell: the fault is on record, the log names it, each rank ends with the code that is promised, a hang
ends within its limit, and a start without the fault ends with the tensors and losses of a run that nobody disturbed.

JANUS_FAULTS=all runs all cells, JANUS_FAULT_SEED=N picks another fifth (by default, the commit does).
"""

import json
import os
import random
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from janus_mega.config.schema import CheckpointConfig
from janus_mega.train import faults, health
from janus_mega.train.faults import KINDS_OF_PHASE, PHASES
from janus_mega.train.starting import started
from tests.support.faulty_runs import HEALTH, LONG_PHASE_FACTOR, Ended, outcome, struck, tiny_run, watched
from tests.support.ranks import import_what_ranks_need
from tests.support.seeds import NUM_FAULT_SEEDS, fault_seed

pytestmark = [pytest.mark.dist, pytest.mark.slow]

import_what_ranks_need()

FIRST, FAULTY, LAST = 2, 4, 6
TIMEOUT_S = 1.0  # of the watchdog; hooks and what comes before the first step may take longer, see `faulty_runs`
SLACK_S = 5.0  # between the limit that the watchdog has then and its report
ERROR = 1
DEAD = {"sigkill": -9, "segfault": -11, "abort": -6}
HANGS = ("sigstop", "gil")
ANYWHERE = (*DEAD, *HANGS, "sigterm", "exception", "slow", "store")
KINDS = (*ANYWHERE, *KINDS_OF_PHASE)


@dataclass(frozen=True)
class Cell:
    """One fault."""

    kind: str
    rank: int
    phase: str
    step: int = FAULTY

    @property
    def id(self) -> str:
        return f"{self.kind}-rank{self.rank}-{self.phase}" + ("-last" if self.step == LAST else "")

    @property
    def text(self) -> str:
        seconds = {"gil": 120, "slow": 1.5, "disk_slow": 1.5}.get(self.kind, 0)
        return f"rank={self.rank},step={self.step},kind={self.kind},phase={self.phase},seconds={seconds}"


def all_cells() -> list[Cell]:
    """Kinds of one phase (numbers go wrong in steps, disks in saves) are in that one, the others in all five.

    The last save of a run is a case of its own where it cannot be made: no later one follows.
    """
    cells = [
        Cell(kind, rank, phase)
        for kind in KINDS
        for phase in PHASES
        if KINDS_OF_PHASE.get(kind, phase) == phase
        for rank in (0, 1)
    ]
    return cells + [Cell(kind, rank, "save", LAST) for kind in ("disk_full", "disk_error") for rank in (0, 1)]


def chosen_cells() -> list[Cell]:
    cells = all_cells()
    if os.environ.get("JANUS_FAULTS") == "all":
        return cells
    shuffled = random.Random(0).sample(cells, len(cells))
    fifth = shuffled[fault_seed() % NUM_FAULT_SEEDS :: NUM_FAULT_SEEDS]  # five seeds leave no cell out
    return sorted(fifth, key=cells.index)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stands at step 2."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    assert tiny_run(run_dir, FIRST).codes == [0, 0]
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(begun: Path) -> dict[str, Any]:
    """What the run comes to."""
    run_dir = begun.with_name("undisturbed")
    shutil.copytree(begun, run_dir)
    assert tiny_run(run_dir, LAST).codes == [0, 0]
    result = outcome(run_dir)
    assert result["step"] == LAST and all(len(found) == 1 for found in result["losses"].values())
    return result


@pytest.fixture(scope="module")
def without_one_update(begun: Path) -> dict[str, Any]:
    """What the run comes to where the update of step 4 is refused by the judge, no number being wrong."""
    run_dir = begun.with_name("refused")
    shutil.copytree(begun, run_dir)
    find, calls = health._not_finite, iter(range(FIRST + 1, LAST + 1))
    health._not_finite = lambda values: "refused" if next(calls) == FAULTY else find(values)
    try:
        assert tiny_run(run_dir, LAST).codes == [0, 0]
    finally:
        health._not_finite = find
    return outcome(run_dir)


def loses_meeting_place(cell: Cell) -> bool:
    """Whether the ranks can not find each other: only while they join do they need the store."""
    return cell.kind == "store" and cell.phase == "init"


def promised(cell: Cell) -> tuple[list[set[int | None]], str]:
    """Codes that each rank may end with, and what the log of some rank says besides the fault."""
    hit, other = cell.rank, 1 - cell.rank
    codes: list[set[int | None]] = [{0}, {0}]
    said = "injected fault"
    if cell.kind in DEAD or (cell.kind == "exception" and cell.phase != "save"):
        # Ranks that join meet at a store, which does not tell them that one of them has died: the parent ends them.
        codes[hit], codes[other] = {DEAD.get(cell.kind, ERROR)}, {ERROR, None} if cell.phase == "init" else {ERROR}
        said = said if cell.phase == "init" else "Connection|connect|peer"
    elif cell.kind == "exception":
        said = "checkpoint of step 4 was not saved.*training goes on"
    elif cell.kind == "sigterm" and cell.phase == "save":  # written beside training, which may be in its last step
        codes, said = [{75, 0}, {75, 0}], f"SIGTERM on rank {hit} in step"
    elif cell.kind == "sigterm":
        codes, said = [{75}, {75}], f"stopped by SIGTERM on rank {hit}; step . of 6 is saved as"
    elif cell.kind in HANGS:
        codes[hit], codes[other], said = {None}, {86}, f"no progress for .* s: rank {hit} on "
    elif loses_meeting_place(cell):
        codes, said = [{86, None}, {86, None}], "no progress for .* s: rank . on "
    elif cell.kind == "nan":
        said = "step 4: update left out on all ranks: loss.*nan"
    elif cell.kind == "flip":
        codes, said = [{78}, {78}], f"ranks hold other values than they should: .*rank {hit} on"
    elif cell.kind in ("disk_full", "disk_error"):
        said = "No space left on device|Input/output error"
        codes = [{ERROR}, {ERROR}] if cell.step == LAST else codes
    return codes, said


def disturbed(cell: Cell, run_dir: Path) -> Ended:
    config = watched(TIMEOUT_S) if cell.kind in HANGS or loses_meeting_place(cell) else HEALTH
    if cell.kind == "flip":
        config = replace(config, replicas_every=1)
    # The last save follows one of the same step that failed, where there is one; here it is the only one.
    checkpoint = CheckpointConfig(save_every=0) if cell.step == LAST else None
    return tiny_run(run_dir, LAST, faults=cell.text, health=config, checkpoint=checkpoint)


@pytest.mark.parametrize("cell", chosen_cells(), ids=lambda cell: cell.id)
def test_a_fault_costs_no_more_than_promised(
    cell: Cell, begun: Path, undisturbed: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(begun, run_dir)
    ended = disturbed(cell, run_dir)
    (fault,) = struck(run_dir)
    assert (fault["fault"], fault["rank"], fault["phase"]) == (cell.text, cell.rank, cell.phase)
    codes, said = promised(cell)
    logs = "\n".join(ended.logs)
    assert all(code in allowed for code, allowed in zip(ended.codes, codes, strict=True)), (ended.codes, logs)
    assert f"injected fault: {cell.kind} on rank {cell.rank}" in ended.logs[cell.rank]
    assert re.search(said, logs), logs
    _check_hang(cell, run_dir, fault)
    again = tiny_run(run_dir, LAST)
    assert again.codes == [0, 0], again.logs
    assert len(struck(run_dir)) == 1
    expected = request.getfixturevalue("without_one_update") if cell.kind == "nan" else undisturbed
    found = outcome(run_dir)
    assert found["tensors"] == expected["tensors"]
    assert cell.kind == "nan" or found["losses"] == expected["losses"]


def test_a_stop_beside_a_dead_peer_ends_at_once(begun: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """There is nothing to save together with; the newest checkpoint stands, and the code says so."""
    run_dir = tmp_path / "run"
    shutil.copytree(begun, run_dir)
    both = "rank=0,step=4,kind=sigterm; rank=1,step=4,kind=sigkill"
    ended = tiny_run(run_dir, LAST, faults=both)
    assert ended.codes == [77, -9], ended.logs
    assert "stopped by SIGTERM in step 4 without having saved: RuntimeError: " in ended.logs[0]
    assert tiny_run(run_dir, LAST, faults=both).codes == [0, 0]
    assert outcome(run_dir) == undisturbed


def test_a_start_that_dies_before_its_first_checkpoint_may_begin_again(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    dying = "rank=0,step=1,kind=abort"
    assert tiny_run(run_dir, FIRST, faults=dying).codes == [-6, 1]
    assert tiny_run(run_dir, FIRST, faults=dying).codes == [0, 0]
    assert outcome(run_dir)["step"] == FIRST


def test_a_restart_by_the_launcher_is_told_from_a_first_start(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with started(run_dir, 0.0, fresh=True) as start:
        assert start.fresh and not start.is_restart
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with started(run_dir, 0.0, fresh=True) as start:
        assert start.fresh and start.is_restart


def _check_hang(cell: Cell, run_dir: Path, fault: dict[str, Any]) -> None:
    if cell.kind not in HANGS:
        return
    (path,) = run_dir.glob("hang-*.json")
    report = json.loads(path.read_text())
    assert [culprit["rank"] for culprit in report["culprits"]] == [cell.rank]
    assert report["limit_s"] >= TIMEOUT_S * (1 if cell.phase in ("step", "save") else LONG_PHASE_FACTOR)
    assert report["time"] - fault["time"] < report["limit_s"] + SLACK_S


def test_every_kind_and_phase_is_in_the_matrix() -> None:
    cells = all_cells()
    assert {cell.kind for cell in cells} == {*faults._KINDS, *faults._DISK_KINDS}
    assert {(cell.rank, cell.phase) for cell in cells} == {(rank, phase) for rank in (0, 1) for phase in PHASES}
    assert len(set(cells)) == len(cells) == 104
