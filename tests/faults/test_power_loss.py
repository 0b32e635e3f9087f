"""A loss of power at any instant of saving, pruning, taking over and converting loses nothing that was acknowledged.

Real functions run on a disk that writes down what they do; a simulated file system then forgets everything that may be
forgotten, in every way that file systems may (`tests.support.crash_states`), and rules say what must still be there
(`tests.support.crash_rules`). Planted bugs (`tests.support.crash_bugs`, counted at the
end) show that the rules see what they are for.
"""

import contextlib
import random
import shutil

import pytest

from janus_mega.checkpoint.claim import claim
from janus_mega.checkpoint.manager import find_latest, save_checkpoint
from tests.support.crash_bugs import BUGS
from tests.support.crash_campaign import ALL, SEED, Campaign, of_all, record
from tests.support.crash_conversions import BY_ONE_PROCESS, EVERY_SCENE
from tests.support.crash_rules import Rules, write_out
from tests.support.crash_states import crash_points
from tests.support.crash_traces import ROOT, difference, play_killed_at, slices_of, state_at, tensors_at

BUDGET = 700
"""States at one instant, roughly."""
MIN_STATES_PER_INSTANT, MIN_INSTANTS = 75, 40
"""Of every scene, for each time it is gone through: 84 on average and 44 were seen in the smallest. All scenes together
have 156,000 states at least, and 1,136,000 in fact."""
NUM_OPERATIONS_MAX = 400
"""More than any scene that is cut short has."""

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def counts(tally):
    """What all tests of this module went through together; told when the last is done."""
    total = Campaign()
    yield total
    tally(f"power losses: {total.num_states:,} states of the disk at {total.num_points:,} instants")


@pytest.mark.parametrize(
    ("name", "world_size"),
    [(name, world_size) for name in EVERY_SCENE for world_size in ((1,) if name in BY_ONE_PROCESS else (1, 2, 3))],
)
def test_nothing_acknowledged_is_lost(name, world_size, fast_folder, counts):
    scene = record(EVERY_SCENE[name], fast_folder, world_size)
    num_turns = 1 if world_size == 1 else 2  # several ranks have more than one order
    seen = Campaign()
    for turn in range(num_turns):
        seen.run(scene, random.Random(f"{SEED} {turn}"), budget=of_all(BUDGET))
    counts.add(seen)
    assert seen.violations == []
    assert seen.num_points >= MIN_INSTANTS * num_turns, "too few operations to be a save"
    assert seen.num_states >= of_all(MIN_STATES_PER_INSTANT) * seen.num_points


def test_a_start_after_a_killed_process_builds_on_nothing_that_can_vanish(new_folder, counts):
    """Killed at every operation, started again, and only then the power fails: caches outlive a process."""
    at, is_cut = 0, True
    for at in range(0 if ALL else SEED % 5, NUM_OPERATIONS_MAX, 1 if ALL else 5):
        outcome = []
        folder = new_folder()
        scene = record(lambda scene, at=at, outcome=outcome: outcome.append(play_killed_at(scene, at)), folder)
        seen = Campaign()
        seen.run(scene, random.Random(SEED), budget=60)
        counts.add(seen)
        assert seen.violations == [], f"killed at operation {at}"
        shutil.rmtree(folder)
        is_cut = outcome[0]
        if not is_cut:
            break
    assert not is_cut, "the scene is longer than the test thinks"
    assert at > 50, "too few operations to be two saves"


@pytest.fixture(scope="module")
def seen_bugs(tally):
    """Names of those that were seen, told when the last is done."""
    names = set()
    yield names
    tally(f"power losses: {len(names)} of {len(BUGS)} planted bugs were tried and seen")


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_seen(name, fast_folder, seen_bugs):
    bug, seen = BUGS[name], Campaign()
    with bug.step() if bug.step else contextlib.nullcontext():
        scene = record(EVERY_SCENE[bug.scene], fast_folder, bug.world_size, lambda rec, rank: bug.disk(rec.disk(rank)))
    seen.run(scene, random.Random(SEED), budget=100)
    in_states = [violation for violation in seen.violations if violation not in scene.problems]
    assert in_states, f"{seen.num_states} states without a violation"
    assert bug.shows_without_crash == bool(scene.problems), scene.problems
    seen_bugs.add(name)


def sampled_states(scene, num_states):
    """(point, state) at random instants, most of them while something is being published or removed."""
    chance = random.Random(SEED)
    points = list(crash_points(scene.recording.other_order(chance)))
    for _ in range(num_states):
        point = chance.choice(points)
        yield point, chance.choice(list(point.states(chance, 40)))


SAMPLED = ["clean retention", "clean new attempt", "clean same step"]
SAMPLED += [name for name, bug in BUGS.items() if bug.scene not in BY_ONE_PROCESS]


@pytest.mark.parametrize("name", SAMPLED)
def test_the_model_and_the_real_discovery_agree(name, fast_folder):
    """States written to a real folder: the library finds what the model says, and goes on from there."""
    clean = name.removeprefix("clean ") if name not in BUGS else None
    bug = BUGS[name] if not clean else None
    scene_name = bug.scene if bug else clean
    base = fast_folder / "played"
    base.mkdir()
    with bug.step() if bug and bug.step else contextlib.nullcontext():
        disk = (lambda rec, rank: bug.disk(rec.disk(rank))) if bug else (lambda rec, rank: rec.disk(rank))
        scene = record(EVERY_SCENE[scene_name], base, 1 if bug is None else bug.world_size, disk)
    rules, found_any = Rules(scene.written), 0
    for number, (_, state) in enumerate(sampled_states(scene, 25)):
        folder = fast_folder / f"{number}"
        folder.mkdir()
        write_out(state, folder)
        found, expected = find_latest(folder / ROOT), rules.find(state, ROOT)
        assert (found and found.name) == expected
        if found is not None:
            found_any += 1
            step = int(found.name.split("-")[1])
            assert difference(found, step) is None
        if number % 5 == 0:
            go_on(folder / ROOT)
    if bug is None:
        assert found_any


def go_on(root):
    """The next attempt claims and saves, whatever a crash has left lying about."""
    path = save_checkpoint(claim(root), slices_of(tensors_at(90), 0, 1), state_at(90))
    assert find_latest(root) == path
    assert difference(path, 90) is None
    assert not [entry.name for entry in root.iterdir() if entry.name.startswith(".trash")]
