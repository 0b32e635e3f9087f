"""Processes that are killed while they save, prune or convert lose nothing that was acknowledged.

More than a thousand real processes in the whole campaign, killed by SIGKILL before operations on the disk (in the
middle of writes) and at instants chosen by chance. A single process that saves is killed at every operation; of saves
beside training, by two ranks and of conversions, chance picks the operations, and how many they were is told. After
each kill the newest acknowledged checkpoint is loaded and compared tensor for tensor, no half of one has a name, and
the next attempt claims, saves, prunes and leaves no rubbish.
"""

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import pytest

from janus_mega.checkpoint.hf.export import export_hf
from tests.support.crash_bugs import WrittenInPlace
from tests.support.crash_campaign import ALL, SEED, of_all
from tests.support.crash_conversions import make_source
from tests.support.crash_rules import content_of
from tests.support.kill_trials import (
    EXPORTED,
    Kill,
    export_twice,
    kills,
    live,
    reshard_once,
    save_and_prune,
    save_beside,
    what_is_lost,
    what_is_lost_of_export,
    what_is_lost_of_reshard,
)
from tests.support.trained import make_checkpoint

LIVES = {
    "saving": (save_and_prune, 1, 450),
    "saving beside training": (save_beside, 1, 250),
    "saving by two ranks": (save_and_prune, 2, 120),
    "saving beside training by two ranks": (save_beside, 2, 120),
}
"""What is killed, by how many ranks it is done, and how many times it is killed in the whole campaign."""
EXPORT_KILLS, RESHARD_KILLS = 80, 80

pytestmark = [pytest.mark.dist, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("name", LIVES)
def test_a_killed_process_loses_nothing_acknowledged(name, new_folder, tally):
    work, world_size, count = LIVES[name]
    done = campaign(work, world_size, of_all(count), what_is_lost, new_folder)
    where = f"at {len(done.hit)} of {len(done.operations)} operations"
    tally(f"kills, {name}: {of_all(count)}, {where}, {done.num_acknowledged} with a checkpoint acknowledged, none lost")
    assert done.num_acknowledged > of_all(count) / 5, "killed so early that there was nothing to lose"
    assert done.hit
    if ALL and name == "saving":
        assert done.hit == done.operations, f"not killed at {sorted(done.operations - done.hit)}"


def test_a_killed_export_leaves_a_whole_directory_or_none(new_folder, tally):
    checkpoint, folder, count = make_checkpoint(new_folder()), new_folder(), of_all(EXPORT_KILLS)
    wholes = [content_of(export_hf(checkpoint, folder / dtype, dtype=dtype)) for dtype in EXPORTED]
    campaign(
        partial(export_twice, checkpoint), 1, count, partial(what_is_lost_of_export, checkpoint, wholes), new_folder
    )
    tally(f"kills, exporting: {count}, every directory whole or absent")


def test_a_killed_reshard_can_be_asked_for_again(new_folder, tally):
    source, count = make_source(new_folder()).directory, of_all(RESHARD_KILLS)
    loss = partial(what_is_lost_of_reshard, source)
    campaign(partial(reshard_once, source), 1, count, loss, new_folder)
    tally(f"kills, resharding: {count}, none lost")


@dataclass
class Done:
    """What a campaign did."""

    operations: set[tuple[int, int]]
    """(rank, number) of each in a life that nothing disturbs."""
    hit: set[tuple[int, int]] = field(default_factory=set)
    """Those of them that a process died before or in."""
    num_killed: int = 0
    num_acknowledged: int = 0
    """How many of the killed had been told that something was saved."""


def campaign(work, world_size, count, loss, new_folder):
    """Kills `count` processes."""
    folder = new_folder()
    whole = live(work, folder, world_size, None)
    assert not whole.was_killed and whole.acknowledged and loss(folder, whole) is None
    assert whole.num_operations.keys() == set(range(world_size)), "a rank did not come to its end"
    done = Done({(rank, at) for rank, number in whole.num_operations.items() for at in range(number)})
    for num_tried, kill in enumerate(kills(random.Random(SEED), whole, world_size)):
        if done.num_killed == count:
            return done
        assert num_tried < 4 * count + 20, "most processes ended before they were killed"
        folder = new_folder()
        ended = live(work, folder, world_size, kill)
        lost = loss(folder, ended)
        assert lost is None, f"{lost}; killed: {kill}, acknowledged: {ended.acknowledged}"
        shutil.rmtree(folder)
        done.num_killed += ended.was_killed
        done.num_acknowledged += ended.was_killed and bool(ended.acknowledged)
        if ended.was_killed and kill.at_operation is not None:
            done.hit.add((kill.rank, kill.at_operation))
    raise AssertionError("kills end")  # they do not


def save_in_place(life):
    """What the campaign must not let through."""
    save_and_prune(replace(life, disk=WrittenInPlace(life.disk)))


def test_a_writer_without_a_rename_does_not_survive_it(new_folder):
    folder, losses = new_folder(), []
    whole = live(save_in_place, folder, 1, None)
    assert what_is_lost(folder, whole) is None, "seen without a kill, which proves nothing of kills"
    for kill in islice(kills(random.Random(SEED), whole, 1), 40):
        folder = new_folder()
        losses.append(what_is_lost(folder, live(save_in_place, folder, 1, kill)))
    assert any(lost and lost.startswith("half of a checkpoint has a name") for lost in losses), losses


def test_a_life_that_hangs_is_not_a_kill(new_folder):
    """Its operation is never reached, so what ends it is patience."""
    with pytest.raises(AssertionError, match=r"^hung: not at its end after 0\.5 s"):
        live(lambda life: time.sleep(60), new_folder(), 1, Kill(at_operation=0), patience_s=0.5)


@pytest.mark.parametrize(
    ("end", "says"), [(partial(os._exit, 3), "a rank ended by itself"), (partial(time.sleep, 60), "hung")]
)
def test_a_life_in_which_another_rank_fails_or_hangs_is_none(new_folder, end, says):
    """The one that would have been killed comes to its end."""

    def work(life):
        if life.rank == 1:
            end()

    with pytest.raises(AssertionError, match=f"^{says}"):
        live(work, new_folder(), 2, Kill(at_operation=10**6), patience_s=5.0)


def test_a_rank_that_another_signal_ends_is_not_killed(new_folder):
    with pytest.raises(AssertionError, match="^a rank ended by itself"):
        live(lambda life: os.kill(os.getpid(), signal.SIGTERM), new_folder(), 1, Kill(at_operation=10**6))
