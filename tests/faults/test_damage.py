"""Damaged checkpoints are never gone on from: every kind of file, every region of it, every kind of damage.

Thousands of seeded trials in the whole campaign: the newest of two checkpoints is damaged, and discovery by two ranks,
which share the hashing, must pass over it, say which file and why, and take the older one. A checkpoint of the first
schema is damaged too. Which of several checkpoints are damaged does not matter: the newest whole one is found.
"""

import itertools
import logging
import os
import random
import shutil
import threading

import pytest

from janus_mega.checkpoint.finding import Seekers, find_newest
from janus_mega.checkpoint.format import find_damage
from janus_mega.checkpoint.manager import Ranks, find_latest, save_checkpoint
from tests.conftest import REPOSITORY
from tests.support.checkpoints import agreement
from tests.support.crash_campaign import SEED, of_all
from tests.support.crash_traces import EXTRA_FILES, difference, on_threads, slices_of, state_at, tensors_at

OLD_SCHEMA = REPOSITORY / "tests" / "data_files" / "checkpoint_v1" / "step-00000003"
TRIALS = 40
"""Of each kind of damage, in each region of each kind of file."""

pytestmark = pytest.mark.timeout(1200)


def save(root, step, world_size=2):
    agree = agreement(world_size)

    def run(rank):
        return save_checkpoint(
            root,
            slices_of(tensors_at(step), rank, world_size),
            state_at(step, rank),
            ranks=Ranks(rank, world_size, agree),
            extra_files=EXTRA_FILES,
        )

    return on_threads(world_size, run, lambda: None)[0]


def found_by_two(root):
    """What each of two ranks, that look together, finds."""
    agree, barrier, told = agreement(2), threading.Barrier(2), []

    def share(content, rank):
        if rank == 0:
            told.append(content)
        barrier.wait(timeout=20)
        return told[0]

    def run(rank):
        return find_newest(root, Seekers(rank, 2, agree, lambda content: share(content, rank)))

    return on_threads(2, run, barrier.abort)


def regions(content, name):
    """Parts of a file by name, as ranges of bytes."""
    if not name.endswith(".safetensors"):
        third = len(content) // 3
        return {"begin": (0, third), "middle": (third, 2 * third), "end": (2 * third, len(content))}
    head = 8 + int.from_bytes(content[:8], "little")
    text = len(content[:head].rstrip())
    parts = {"length": (0, 8), "header": (8, text), "padding": (text, head), "tensors": (head, len(content))}
    return {region: (start, end) for region, (start, end) in parts.items() if end > start}


def flip_bit(content, start, end, chance):
    place = chance.randrange(start, end)
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


def flip_some(content, start, end, chance):
    for _ in range(chance.randrange(2, 9)):
        content = flip_bit(content, start, end, chance)
    return content


def cut(content, start, end, chance):
    return content[: chance.randrange(start, end)]


def zero(content, start, end, chance):
    first = chance.randrange(start, end)
    last = chance.randrange(first, end) + 1
    return content[:first] + bytes(last - first) + content[last:]


def insert(content, start, end, chance):
    place = chance.randrange(start, end + 1)
    return content[:place] + chance.choice((b"\0", b" ", b"\n", content[:8])) + content[place:]


def leave_out(content, start, end, chance):
    first = chance.randrange(start, end)
    return content[:first] + content[first + chance.randrange(1, 9) :]


def swap(content, start, end, chance):
    """Two pieces of equal length change places."""
    size = min(chance.randrange(1, 17), (end - start) // 2)
    first = chance.randrange(start, end - 2 * size + 1)
    second = chance.randrange(first + size, end - size + 1)
    one, other = content[first : first + size], content[second : second + size]
    return content[:first] + other + content[first + size : second] + one + content[second + size :]


def repeat(content, start, end, chance):
    """A piece is written over the one behind it, as a lost write leaves the old block."""
    size = min(chance.randrange(1, 17), (end - start) // 2)
    first = chance.randrange(start, end - 2 * size + 1)
    return content[: first + size] + content[first : first + size] + content[first + 2 * size :]


DAMAGES = (flip_bit, flip_some, cut, zero, insert, leave_out, swap, repeat)
FILES = (
    "manifest.json",
    "tensors.json",
    "state.json",
    "config.yaml",
    "text_tokenizer/tokenizer.model",
    "tensors-00000.safetensors",
    "tensors-00001.safetensors",
)


@pytest.fixture
def two(fast_folder):
    """A folder with checkpoints of steps 4 and 8."""
    root = fast_folder / "checkpoints"
    save(root, 4)
    save(root, 8)
    return root


def assert_passed_over(root, caplog, what):
    newest, older = root / "step-00000008", root / "step-00000004"
    assert find_damage(newest) is not None, what
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert found_by_two(root) == [older, older], what
    said = [record.getMessage() for record in caplog.records]
    assert any("passing over a damaged checkpoint" in line and str(newest) in line for line in said), (what, said)
    assert not any(str(older) in line for line in said), (what, said)


@pytest.mark.parametrize("name", FILES)
def test_damage_in_any_region_of_any_file_is_found(name, two, caplog, tally):
    chance, count = random.Random(f"{SEED} {name}"), 0
    path = two / "step-00000008" / name
    whole = path.read_bytes()
    for region, (start, end) in regions(whole, name).items():
        for damage in DAMAGES:
            for _ in range(of_all(TRIALS)):
                content = damage(whole, start, end, chance)
                if content == whole:
                    continue
                path.write_bytes(content)
                assert_passed_over(two, caplog, (name, region, damage.__name__))
                count += 1
    path.write_bytes(whole)
    assert found_by_two(two) == [two / "step-00000008"] * 2
    assert difference(two / "step-00000008", 8) is None
    tally(f"damage in {name}: {count} times, all found, the older checkpoint taken")
    assert count > of_all(TRIALS) * len(DAMAGES)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_and_others_in_their_place_are_found(name, two, caplog):
    newest, older = two / "step-00000008", two / "step-00000004"
    path, away = newest / name, two.parent / "away"
    whole = path.read_bytes()
    others = [older / name, *(newest / other for other in FILES if other != name)]
    path.rename(away)
    assert_passed_over(two, caplog, f"{name} missing")
    for make in (path.mkdir, lambda: path.symlink_to(away), lambda: os.mkfifo(path), path.touch):
        make()
        assert_passed_over(two, caplog, f"{name} is something else")
        path.rmdir() if path.is_dir() else path.unlink()
    for other in others:
        if other.read_bytes() == whole:
            continue
        shutil.copy(other, path)
        assert_passed_over(two, caplog, f"{other} in the place of {name}")
    away.replace(path)
    assert find_damage(newest) is None


def test_swapped_and_extra_files_are_found(two, caplog):
    newest = two / "step-00000008"
    for one, other in itertools.combinations(FILES, 2):
        first, second = (newest / one).read_bytes(), (newest / other).read_bytes()
        (newest / one).write_bytes(second), (newest / other).write_bytes(first)
        assert_passed_over(two, caplog, f"{one} and {other} swapped")
        (newest / one).write_bytes(first), (newest / other).write_bytes(second)
    for extra in ("stray", "text_tokenizer/stray", "tensors-00002.safetensors", ".hidden"):
        (newest / extra).write_bytes(b"x")
        assert_passed_over(two, caplog, f"{extra} more")
        (newest / extra).unlink()
    (newest / "empty").mkdir()
    assert_passed_over(two, caplog, "a directory more")


def test_a_checkpoint_under_the_name_of_another_step_is_found(two):
    shutil.move(two / "step-00000004", two / "step-00000012")
    assert found_by_two(two) == [two / "step-00000008"] * 2


def test_damage_to_the_first_schema_is_found(fast_folder):
    chance, count = random.Random(SEED), 0
    newest = fast_folder / OLD_SCHEMA.name
    shutil.copytree(OLD_SCHEMA, newest)
    assert find_latest(fast_folder) == newest
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for damage in DAMAGES:
            for _ in range(of_all(TRIALS)):
                content = damage(whole, 0, len(whole), chance)
                if content != whole:
                    path.write_bytes(content)
                    assert find_latest(fast_folder) is None, (path.name, damage.__name__)
                    count += 1
        path.write_bytes(whole)
    assert count > of_all(TRIALS) * len(DAMAGES)


def test_whichever_of_four_are_damaged_the_newest_whole_one_is_found(fast_folder, caplog):
    root, steps = fast_folder / "checkpoints", (2, 4, 6, 8)
    wholes = {step: save(root, step) / "tensors-00001.safetensors" for step in steps}
    for damaged in itertools.chain.from_iterable(itertools.combinations(steps, size) for size in range(5)):
        contents = {step: wholes[step].read_bytes() for step in damaged}
        for step, content in contents.items():
            wholes[step].write_bytes(flip_bit(content, 0, len(content), random.Random(step)))
        expected = max(set(steps) - set(damaged), default=None)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            found = found_by_two(root)[0]
        assert found == (expected and root / f"step-{expected:08d}")
        said = caplog.text
        for step in damaged:
            assert (f"step-{step:08d}" in said) == (expected is None or step > expected)
        for step, content in contents.items():
            wholes[step].write_bytes(content)
