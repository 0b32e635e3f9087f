"""Disks that fill up, fail, cannot be written to or are slow: a save fails cleanly, what was saved before stays.

Every operation of a save and of what follows it fails once, for every error a disk gives; a really full and a really
read-only file system are mounted where this user may (in a namespace of a forked process, so nobody else sees them),
and the limit on the size of files stands in where not.
"""

import contextlib
import ctypes
import errno
import os
import random
import resource
import signal
import sys
import threading
import time
import traceback

import pytest

from janus_mega.checkpoint.claim import claim
from janus_mega.checkpoint.disk import DISK
from janus_mega.checkpoint.format import find_damage
from janus_mega.checkpoint.manager import Ranks, find_latest, list_checkpoints, save_checkpoint
from janus_mega.checkpoint.retention import apply_retention
from janus_mega.checkpoint.staging import Staging
from janus_mega.train.writer import Verdict, Writer
from tests.support.checkpoints import agreement
from tests.support.crash_campaign import SEED, share
from tests.support.crash_disk import failing_disk, full_disk, num_operations, slow_disk
from tests.support.crash_traces import EXTRA_FILES, difference, slices_of, state_at, tensors_at

ERRORS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ESTALE)
CLONE_NEWNS, CLONE_NEWUSER, MS_PRIVATE, MS_REC, MS_REMOUNT, MS_RDONLY = 0x20000, 0x10000000, 1 << 18, 1 << 14, 32, 1
NOT_PERMITTED = 77

pytestmark = pytest.mark.timeout(1200)


def save(place, step, disk=DISK, rank=0, world_size=1, agree=None):
    """One rank's part of a save."""
    tensors = slices_of(tensors_at(step), rank, world_size)
    ranks = Ranks(rank, world_size, agree) if agree else Ranks()
    return save_checkpoint(place, tensors, state_at(step, rank), ranks=ranks, extra_files=EXTRA_FILES, disk=disk)


def error_of(run):
    """The number of the error that the system gave, or None."""
    try:
        run()
    except OSError as error:
        return error.errno
    return None


def assert_good(root, *steps):
    """The newest is one of these, exact, and everything with a name is whole."""
    newest = find_latest(root)
    step = int(newest.name.split("-")[1])
    assert step in steps
    assert difference(newest, step) is None
    assert [find_damage(entry.path) for entry in list_checkpoints(root)] == [None] * len(list_checkpoints(root))


def save_and_prune(place, step, disk):
    """As after every save of a run."""
    apply_retention(place, 1, written=save(place, step, disk), disk=disk)


def operations_of_a_save(folder):
    """How many there are when a checkpoint is saved beside another, and the older goes."""
    mine = claim(folder)
    save(mine, 2)
    return num_operations(lambda disk: save_and_prune(mine, 4, disk))


@pytest.mark.parametrize("code", ERRORS, ids=[errno.errorcode[code] for code in ERRORS])
@pytest.mark.parametrize("how", ["once", "from then on"])
def test_any_operation_may_fail(code, how, new_folder):
    count = operations_of_a_save(new_folder())
    assert count > 30
    for at in share(range(count)):
        root = new_folder() / "checkpoints"
        mine = claim(root)
        save(mine, 2)
        disk = failing_disk(code, lambda number, kind, at=at: number == at or (number > at and how == "from then on"))
        assert error_of(lambda mine=mine, disk=disk: save_and_prune(mine, 4, disk)) == code
        assert_good(root, 2, 4)
        save_and_prune(mine, 6, DISK)  # the disk is well again, the attempt goes on
        assert_good(root, 6)
        assert [entry.step for entry in list_checkpoints(root)] == [6]
        left = {path.name for path in root.iterdir()} - {"step-00000006", mine.directory.name}
        assert not left and not list(mine.directory.iterdir())


def test_a_disk_that_fills_up_is_left_as_empty_as_before(new_folder):
    """What a failed save has written is removed: it may be what the next one needs."""
    count = operations_of_a_save(new_folder())
    for at in share(range(count)):
        root = new_folder() / "checkpoints"
        mine = claim(root)
        save(mine, 2)
        error = error_of(lambda mine=mine, at=at: save(mine, 4, full_disk(at)))
        if error is not None:
            assert error == errno.ENOSPC
            assert_good(root, 2)
            assert not list(mine.directory.iterdir())


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_failure_on_one_rank_is_one_on_all_and_nobody_waits(failing_rank, new_folder):
    chance = random.Random(SEED)
    for at in share(range(30)):
        root, agree, outcomes = new_folder() / "checkpoints", agreement(2), [None, None]
        mine = claim(root)
        save(mine, 2)
        fails_at = at if failing_rank == 0 else chance.randrange(8)

        def run(rank, mine=mine, agree=agree, outcomes=outcomes, fails_at=fails_at):
            disk = failing_disk(errno.EIO, lambda number, kind: number == fails_at) if rank == failing_rank else DISK
            try:
                outcomes[rank] = save(mine, 4, disk, rank, 2, agree)
            except OSError as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert all(isinstance(outcome, OSError) for outcome in outcomes), outcomes
        assert outcomes[failing_rank].errno == errno.EIO
        assert_good(root, 2, 4)


def test_a_slow_disk_holds_up_the_writer_and_not_who_trains(new_folder):
    root = new_folder() / "checkpoints"
    mine, writer, staging, tensors = claim(root), Writer(None), Staging(), tensors_at(4)
    save(mine, 2)
    start = time.monotonic()
    snapshot = staging.snapshot(slices_of(tensors, 0, 1))
    writer.begin(4, lambda: save_checkpoint(mine, snapshot, state_at(4), extra_files=EXTRA_FILES, disk=slow_disk(0.03)))
    begun_s = time.monotonic() - start
    for tensor in tensors.values():
        tensor.zero_()  # training goes on
    outcome = writer.take(wait=True)
    assert outcome.verdict is Verdict.saved and outcome.seconds > 0.6
    assert begun_s < outcome.seconds / 3
    assert_good(root, 4)


def test_a_failing_disk_under_the_writer_is_told_and_not_raised(new_folder):
    root, writer = new_folder() / "checkpoints", Writer(None)
    mine = claim(root)
    save(mine, 2)
    writer.begin(4, lambda: save(mine, 4, full_disk(5)))
    outcome = writer.take(wait=True)
    assert outcome.verdict is Verdict.failed and outcome.path is None
    assert outcome.error.errno == errno.ENOSPC
    assert_good(root, 2)


class NotPermittedError(Exception):
    """This user may not mount."""


def in_a_process(run):
    """Whether `run()` came to its end in a forked process; skips the test if it was not permitted something."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        except NotPermittedError:
            code = NOT_PERMITTED
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == NOT_PERMITTED:
        pytest.skip("mounting a tmpfs needs root, or user namespaces that the kernel allows")
    return code == 0


def mount(folder, options, flags=0):
    """A tmpfs at a folder, in this process's own view of file systems."""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(code):
        if code:
            raise NotPermittedError(os.strerror(ctypes.get_errno()))

    if not flags:
        if libc.unshare(CLONE_NEWNS):
            check(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
        check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options.encode()))


def fill(path, size):
    """Writes a file as far as there is room."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        for _ in range(size // 4096):
            file.write(bytes(4096))


def test_a_full_file_system(fast_folder):
    """Sizes from one that holds the second checkpoint almost to one that holds nothing more."""

    def run():
        mount(fast_folder, "size=160k")
        mine, saved, outcomes = claim(fast_folder / "checkpoints"), 2, set()
        save(mine, 2)
        ballast = fast_folder / "ballast"
        for size in (*share(range(4096, 120 * 1024, 4096)), 159 * 1024):
            fill(ballast, size)
            error = error_of(lambda step=saved + 2: save(mine, step))
            outcomes.add(error)
            saved += 2 * (error is None)
            assert not list(mine.directory.iterdir())
            assert_good(mine.root, saved)
            ballast.unlink()
            apply_retention(mine, 1)
        assert outcomes == {None, errno.ENOSPC}

    assert in_a_process(run)


def test_a_file_system_that_turns_read_only(fast_folder):
    def run():
        mount(fast_folder, "size=10m")
        mine = claim(fast_folder / "checkpoints")
        save(mine, 2)
        mount(fast_folder, "", MS_REMOUNT | MS_RDONLY)
        for _ in range(2):
            with pytest.raises(OSError) as caught:
                save(mine, 4)
            assert caught.value.errno == errno.EROFS
            assert_good(mine.root, 2)
        mount(fast_folder, "", MS_REMOUNT)
        save(mine, 4)
        assert_good(mine.root, 4)

    assert in_a_process(run)


def test_a_limit_on_the_size_of_files(fast_folder):
    """What users without a mount see of a full disk: a write that stops in the middle of a file."""

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        mine = claim(fast_folder / "checkpoints")
        save(mine, 2)
        size = max(path.stat().st_size for path in mine.root.rglob("*") if path.is_file())
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for limit in share(range(1, size, max(1, size // 60))):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(OSError) as caught:
                save(mine, 4)
            assert caught.value.errno == errno.EFBIG
            assert_good(mine.root, 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        save(mine, 4)
        assert_good(mine.root, 4)

    assert in_a_process(run)
