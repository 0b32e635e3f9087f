"""Processes that are killed while they save, prune or convert lose nothing that was acknowledged.

A thousand real processes in the whole campaign, killed by SIGKILL before operations on the disk (every one of them, and
in the middle of writes) and at instants chosen by chance. After each the newest acknowledged checkpoint is loaded and
compared tensor for tensor, no half of one has a name, and the next attempt claims, saves, prunes and leaves no rubbish.
"""

import random
import shutil
from dataclasses import replace
from functools import partial
from itertools import islice

import pytest

from janus_mega.checkpoint.hf.export import export_hf
from tests.support.crash_bugs import WrittenInPlace
from tests.support.crash_campaign import SEED, of_all
from tests.support.crash_conversions import make_source
from tests.support.crash_rules import content_of
from tests.support.kill_trials import (
    EXPORTED,
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
    "saving": (save_and_prune, 1, 350),
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
    num_acknowledged = campaign(work, world_size, of_all(count), what_is_lost, new_folder)
    tally(f"kills, {name}: {of_all(count)}, {num_acknowledged} with a checkpoint acknowledged, none lost")
    assert num_acknowledged > of_all(count) / 5, "killed so early that there was nothing to lose"


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


def campaign(work, world_size, count, loss, new_folder):
    """Kills `count` processes; returns how many of them had been told that something was saved."""
    folder = new_folder()
    whole = live(work, folder, world_size, None)
    assert not whole.was_killed and whole.acknowledged and loss(folder, whole) is None
    num_killed = num_acknowledged = 0
    for num_tried, kill in enumerate(kills(random.Random(SEED), whole, world_size)):
        if num_killed == count:
            return num_acknowledged
        assert num_tried < 4 * count + 20, "most processes ended before they were killed"
        folder = new_folder()
        ended = live(work, folder, world_size, kill)
        lost = loss(folder, ended)
        assert lost is None, f"{lost}; killed: {kill}, acknowledged: {ended.acknowledged}"
        shutil.rmtree(folder)
        num_killed += ended.was_killed
        num_acknowledged += ended.was_killed and bool(ended.acknowledged)


def save_in_place(life):
    """What the campaign must not let through."""
    save_and_prune(replace(life, disk=WrittenInPlace(life.disk)))


def test_a_writer_without_a_rename_does_not_survive_it(new_folder):
    whole = live(save_in_place, new_folder(), 1, None)
    losses = []
    for kill in islice(kills(random.Random(SEED), whole, 1), 40):
        folder = new_folder()
        losses.append(what_is_lost(folder, live(save_in_place, folder, 1, kill)))
    assert any(losses)
