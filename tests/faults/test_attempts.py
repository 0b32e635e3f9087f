"""Two or three attempts of one run are alive at once: whatever order their operations take, the old one publishes and
removes nothing once a newer claim has returned, and nothing that was published is lost or mixed.

A thousand interleavings with JANUS_FAULTS=all, else a fifth of them that JANUS_FAULT_SEED or the commit picks.
"""

import multiprocessing
import os
import re
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_mega.checkpoint import claim as claim_module
from janus_mega.checkpoint import manager, retention
from janus_mega.checkpoint.claim import Claim, Superseded, claim, list_claims
from janus_mega.checkpoint.disk import Disk
from janus_mega.checkpoint.format import find_damage, read_manifest
from janus_mega.checkpoint.manager import (
    Ranks,
    find_latest,
    list_checkpoints,
    load_state,
    load_weights,
    save_checkpoint,
)
from janus_mega.checkpoint.retention import apply_retention
from janus_mega.checkpoint.state import TrainState
from janus_mega.config.schema import CheckpointConfig
from janus_mega.parallel.forked import _rank_main
from janus_mega.parallel.slices import Slice
from janus_mega.train.exits import SUPERSEDED
from tests.support.baton import Baton, Killed, TurnDisk
from tests.support.crash_campaign import ALL, SEED
from tests.support.faulty_runs import HEALTH, _rank, tiny_run
from tests.support.ranks import import_what_ranks_need

import_what_ranks_need()

INTERLEAVINGS = 1000
SEEDS = range(INTERLEAVINGS) if ALL else range(SEED % 5, INTERLEAVINGS, 5)
MOST_STEPS = 3
KEEP_LAST = 2
ELEMENTS = 6
PATIENCE = 3000
"""Turns that a rank waits for a peer that was killed."""


@dataclass
class Attempt:
    """One start of the run, on one rank or two."""

    number: int
    num_ranks: int
    num_steps: int
    claimed: Claim | None = None
    is_refused: bool = False
    """Whether a newer attempt was there before its claim was made."""
    start: int = 0
    """Step of the checkpoint that it found; 0 for none."""
    votes: list[list[bool]] = field(default_factory=list)
    outcomes: dict[int, str] = field(default_factory=dict)
    """Of each rank that was not killed."""


class Story:
    """One interleaving, and every promise in it that was not kept."""

    def __init__(self, root: Path, seed: int, keep_last: int = KEEP_LAST) -> None:
        self.root = root
        self.keep_last = keep_last
        self.baton = Baton(seed)
        self.attempts: list[Attempt] = []
        self.live: dict[str, int] = {}
        """Name of each checkpoint that should be there -> the attempt that published it."""
        self.acknowledged = 0
        """Newest step whose save has returned."""
        self.broken: list[str] = []
        self.counts: Counter[str] = Counter()

    def play(self) -> None:
        """Starts the attempts, some of which are killed or start again, and checks what is left at the end."""
        chance = self.baton.chance
        for number in range(1, chance.choice([2, 3]) + 1):
            self._start(number, restarts=chance.random() < 0.3)
            if chance.random() < 0.25:
                ranks = list(range(self.attempts[-1].num_ranks))
                victims = ranks if chance.random() < 0.7 else [chance.choice(ranks)]
                self.baton.doom_at[chance.randrange(1, 300)] = [f"{number}.{rank}" for rank in victims]
        self.baton.run()
        for name, error in self.baton.errors.items():
            self.broken.append(f"rank {name} ended with {''.join(traceback.format_exception(error))}")
        self._check_end()

    def _start(self, number: int, *, restarts: bool) -> None:
        chance = self.baton.chance
        num_ranks = 1 if restarts else chance.choice([1, 2])
        attempts = [Attempt(number, num_ranks, chance.randint(1, MOST_STEPS))]
        if restarts:
            attempts.append(Attempt(number + 10, 1, chance.randint(1, MOST_STEPS)))
        self.attempts += attempts

        def work(rank: int) -> None:
            for attempt in attempts:
                self._run(attempt, rank)

        for rank in range(num_ranks):
            self.baton.add(f"{number}.{rank}", lambda rank=rank: work(rank))

    def _run(self, attempt: Attempt, rank: int) -> None:
        disk = TurnDisk(self.baton, self.root, lambda source, target: self._see_rename(attempt, source, target))
        try:
            self._claim(attempt, rank, disk)
            ranks = Ranks(rank, attempt.num_ranks, self._agreement(attempt))
            for step in range(attempt.start + 1, attempt.start + attempt.num_steps + 1):
                self._save_and_tell(attempt, ranks, step, disk)
            attempt.outcomes[rank] = "done"
        except Superseded:
            attempt.outcomes[rank] = "superseded"
            if not any(other.claimed is None or self._is_newer(other, attempt) for other in self.attempts):
                self.broken.append(f"attempt {attempt.number} was superseded by nobody")

    def _claim(self, attempt: Attempt, rank: int, disk: Disk) -> None:
        """Rank 0 claims and looks for a checkpoint; the others hear of it."""
        while rank and not attempt.claimed and not attempt.is_refused:
            self._wait_for_peer(attempt)
        if rank == 0:
            try:
                mine = claim(self.root, disk=disk)
            except Superseded:
                attempt.is_refused = True
                raise
            found = find_latest(self.root)  # in the turn in which the claim returns
            if {entry.path.name for entry in list_checkpoints(self.root)} != set(self.live):
                self.broken.append(f"attempt {attempt.number} does not see what was published: {sorted(self.live)}")
            attempt.start = list_checkpoints(self.root)[-1].step if found else 0
            if attempt.start < self.acknowledged or (found is None) != (not self.live):
                self.broken.append(f"attempt {attempt.number} found {found}; step {self.acknowledged} was acknowledged")
            attempt.claimed = mine
        if attempt.is_refused:
            raise Superseded("rank 0 was refused")

    def _agreement(self, attempt: Attempt) -> Callable[[bool], bool]:
        calls = iter(range(10**6))

        def agree(ok: bool) -> bool:
            number = next(calls)
            attempt.votes += [[] for _ in range(number + 1 - len(attempt.votes))]
            attempt.votes[number].append(ok)
            while len(attempt.votes[number]) < attempt.num_ranks:
                self._wait_for_peer(attempt)
            self.baton.pause()
            return all(attempt.votes[number])

        return agree

    def _wait_for_peer(self, attempt: Attempt) -> None:
        self.baton.pause()
        if any(self.baton.is_dead(f"{attempt.number}.{rank}") for rank in range(attempt.num_ranks)):
            raise Killed  # a job that has lost a rank is ended by its launcher

    def _save_and_tell(self, attempt: Attempt, ranks: Ranks, step: int, disk: Disk) -> None:
        """As the writer's thread does it: how a save ended is known to all ranks."""
        failure: Exception | None = None
        try:
            self._save(attempt, ranks, step, disk)
        except Exception as error:
            failure = error
        if not ranks.agree(not isinstance(failure, Superseded)):
            raise Superseded("here or on another rank")
        if failure is not None:  # training would go on without this checkpoint, but there is no reason to fail here
            self.broken.append(
                f"step {step} of attempt {attempt.number}: {''.join(traceback.format_exception(failure))}"
            )

    def _save(self, attempt: Attempt, ranks: Ranks, step: int, disk: Disk) -> None:
        """One save and what follows it, as training does it."""
        assert attempt.claimed is not None
        width = ELEMENTS // ranks.world_size
        piece = Slice(
            "w", (ELEMENTS,), (ranks.rank * width,), torch.full((width,), float(1000 * attempt.number + step))
        )
        state = TrainState(step=step, consumed_rows=attempt.number, plan_digest="", config_text="")
        extra = {"attempt.txt": str(attempt.number).encode()}
        path = save_checkpoint(attempt.claimed, [piece], state, ranks=ranks, extra_files=extra, disk=disk)
        if ranks.rank == 0:
            self.acknowledged = max(self.acknowledged, step)
            apply_retention(attempt.claimed, self.keep_last, written=path, disk=disk)

    def _is_newer(self, other: Attempt, attempt: Attempt) -> bool:
        return bool(other.claimed and (attempt.claimed is None or other.claimed > attempt.claimed))

    def _see_rename(self, attempt: Attempt, source: Path, target: Path) -> None:
        """Right after the operation, before anybody else runs."""
        if target.parent == self.root and target.name.startswith("step-"):
            what, name = "published", target.name
            self.live[name] = attempt.number
        elif source.parent == self.root and source.name.startswith("step-"):
            what, name = "removed", source.name
            del self.live[name]
        else:
            return
        self.counts[what] += 1
        newer = [other.number for other in self.attempts if self._is_newer(other, attempt)]
        if newer:
            self.broken.append(
                f"turn {self.baton.now}: attempt {attempt.number} {what} {name} after {newer} had claimed"
            )

    def _check_end(self) -> None:
        found = list_checkpoints(self.root)
        if {entry.path.name for entry in found} != set(self.live):
            self.broken.append(f"{[entry.path.name for entry in found]} are there, not {sorted(self.live)}")
        for entry in found:
            damage = find_damage(entry.path)
            if damage:
                self.broken.append(damage)
                continue
            number = self.live.get(entry.path.name, 0)
            told = {int(value) for value in load_weights(entry.path)["w"].tolist()}
            text = int((entry.path / "attempt.txt").read_text())
            of = {text, load_state(entry.path).consumed_rows, read_manifest(entry.path).get("attempt")} - {None}
            if told != {1000 * number + entry.step} or not {number} <= of <= {number, self._claim_number(number)}:
                self.broken.append(f"{entry.path.name} of attempt {number} holds {told} and files of {of}")
        self._check_newest()
        self.counts.update(outcome for attempt in self.attempts for outcome in attempt.outcomes.values())
        self.counts["killed"] += sum(attempt.num_ranks - len(attempt.outcomes) for attempt in self.attempts)
        self.counts["superseded while saving"] += sum(
            bool(attempt.votes) and "superseded" in attempt.outcomes.values() for attempt in self.attempts
        )

    def _check_newest(self) -> None:
        """The newest attempt has outlived all others, unless one was killed while it took over from it."""
        claimed = [(attempt.claimed, attempt) for attempt in self.attempts if attempt.claimed]
        if not claimed:
            return
        mine, newest = max(claimed, key=lambda pair: pair[0])
        left = list_claims(self.root)
        is_cut_short = any(not attempt.claimed and not attempt.is_refused for attempt in self.attempts)
        if any(other < mine for other in left) or (left != [mine] and not is_cut_short):
            self.broken.append(f"claims left: {left}")
        if "superseded" in newest.outcomes.values() and not is_cut_short:
            self.broken.append(f"the newest attempt {newest.number} was superseded")

    def _claim_number(self, number: int) -> int:
        (attempt,) = [attempt for attempt in self.attempts if attempt.number == number]
        assert attempt.claimed is not None
        return attempt.claimed.number


def play(folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch, keep_last: int = KEEP_LAST) -> Story:
    story = Story(folder / str(seed) / "checkpoints", seed, keep_last)
    monkeypatch.setattr(claim_module.secrets, "randbits", story.baton.chance.getrandbits)
    story.play()
    return story


def test_an_old_attempt_publishes_nothing_and_loses_nothing(
    fast_folder: Path, monkeypatch: pytest.MonkeyPatch, tally: Callable[[str], None]
) -> None:
    counts: Counter[str] = Counter()
    for seed in SEEDS:
        story = play(fast_folder, seed, monkeypatch)
        assert story.broken == [], f"seed {seed}"
        counts += story.counts
    tally(f"{len(SEEDS)} interleavings of attempts: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    # The interleavings are worth their name: saves are taken over from in the middle, attempts are killed and publish.
    assert counts["superseded while saving"] > 0.2 * len(SEEDS), counts
    assert counts["published"] > len(SEEDS) and counts["removed"] > 0.2 * len(SEEDS), counts
    assert counts["killed"] > 0.1 * len(SEEDS), counts


def _no_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim_module, "_fence", lambda other, disk: None)


def _check_then_rename(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fence, but a look before each publication whether a newer attempt is there."""
    _no_fence(monkeypatch)
    publish = manager._publish

    def look_and_publish(mine: Claim, *rest: object) -> None:
        if any(other > mine for other in list_claims(mine.root)):
            raise Superseded("a newer attempt is there")
        publish(mine, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(manager, "_publish", look_and_publish)


def _retention_beside_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renames within the root before it removes, which a fenced attempt still can; syncs first, to be met doing it."""

    def remove(entry: manager.Found, place: object, disk: Disk) -> None:
        for _ in list(entry.path.iterdir()):
            disk.sync_directory(entry.path)
        trash = entry.path.with_name(f".trash-{entry.path.name}")
        disk.rename(entry.path, trash)
        disk.remove_tree(trash)

    monkeypatch.setattr(retention, "_remove", remove)


def _folder_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the checkpoint makes whatever directory is missing above it, also one that was fenced off."""
    write = manager._write_extra

    def make_and_write(aside: Path, name: str, content: bytes | Path, disk: Disk) -> object:
        disk.make_directories((aside / name).parent)
        return write(aside, name, content, disk)

    monkeypatch.setattr(manager, "_write_extra", make_and_write)


def _shared_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts write into one folder, as those would that are known by the step alone."""
    monkeypatch.setattr(Claim, "directory", property(lambda self: self.root / ".attempt-0001-00000001"))


PLANTED = dict.fromkeys((_no_fence, _check_then_rename, _folder_comes_back), r"published step-\S+ after .+ had claimed")
PLANTED[_retention_beside_the_claim] = r"removed step-\S+ after .+ had claimed"
PLANTED[_shared_folder] = r"File exists: .*/\.attempt-0001-00000001'|the newest attempt \d+ was superseded"
"""What must be said of each: another failure, such as that of a plant which no longer fits the code, is no catch."""


@pytest.mark.parametrize("plant", PLANTED)
def test_planted_bugs_are_caught(
    plant: Callable[[pytest.MonkeyPatch], None], fast_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    keep_last = 1 if plant is _retention_beside_the_claim else KEEP_LAST  # more of what the bug is in
    for seed in range(1, INTERLEAVINGS):
        try:
            broken = play(fast_folder, seed, monkeypatch, keep_last).broken
        except TimeoutError:  # some plants make an attempt wait without end, which tells little
            continue
        assert not re.search("TypeError|AttributeError", "".join(broken)), "the plant no longer fits the code"
        if any(re.search(PLANTED[plant], line) for line in broken):
            return
    raise AssertionError(f"nothing in {INTERLEAVINGS} interleavings was {PLANTED[plant]!r}")


def started_ranks(run_dir: Path, last_step: int) -> list[Any]:
    """A run on two ranks that is not waited for."""
    context = multiprocessing.get_context("fork")
    logs = [run_dir / f"old-{rank}.log" for rank in range(2)]
    arguments = (run_dir, last_step, "", HEALTH, CheckpointConfig(save_every=2, keep_last=3), logs)
    rest = (2, str(run_dir / "store"), 60.0, 1, _rank, arguments)
    processes = [context.Process(target=_rank_main, args=(rank, *rest), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    return processes


def contents(run_dir: Path) -> dict[str, bytes]:
    """Every published file."""
    folders = [entry.path for entry in list_checkpoints(run_dir / "checkpoints")]
    return {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.mark.dist
@pytest.mark.parametrize("pause_s", [0.0, 0.15])
def test_a_run_that_slept_while_another_took_over_ends_as_superseded(pause_s: float, tmp_path: Path) -> None:
    """Real processes: the old ranks are stopped somewhere in their work, go on when the new run is done."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    old = started_ranks(run_dir, 10_000)
    try:
        deadline = time.monotonic() + 60
        while not any(entry.step >= 4 for entry in list_checkpoints(run_dir / "checkpoints")):
            assert time.monotonic() < deadline and all(process.is_alive() for process in old)
            time.sleep(0.01)
        time.sleep(pause_s)
        for process in old:
            os.kill(process.pid, signal.SIGSTOP)
        before = list_checkpoints(run_dir / "checkpoints")[-1].step
        new = tiny_run(run_dir, before + 4)
        assert new.codes == [0, 0], new.logs
        assert f"step {before}" in new.logs[0] or f"step-{before:08d}" in new.logs[0]
        published = contents(run_dir)
        for process in old:
            os.kill(process.pid, signal.SIGCONT)
        for process in old:
            process.join(60)
        assert [process.exitcode for process in old] == [SUPERSEDED, SUPERSEDED]
        assert "taken over from attempt 1" in (run_dir / "old-0.log").read_text()
        assert contents(run_dir) == published
        assert list_checkpoints(run_dir / "checkpoints")[-1].path.name == f"step-{before + 4:08d}"
    finally:
        for process in old:
            process.kill()
            process.join()
