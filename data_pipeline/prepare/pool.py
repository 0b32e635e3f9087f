"""A pool of processes for tasks: each starts afresh, gets the work once, then a task at a time over its own pipe.

Processes are spawned, never forked: threads and devices of libraries that are loaded here would not survive a fork. A
pipe for each shows at once when either end is gone: a worker that was killed (out of memory) is reported, and workers
whose master was killed end by themselves. Ctrl-C is left to the master, which ends the workers, and those drop what
they were writing.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import NoReturn

from data_pipeline.errors import UserError
from data_pipeline.prepare.options import ONE_THREAD, Counts
from data_pipeline.prepare.task import Work, do_task

PATIENCE_S = 20.0
"""How long a worker that was asked to end may take before it is killed."""


def do_in_pool(work: Work, tasks: list[int], workers: int, made: Callable[[Counts], None]) -> None:
    """Does the tasks in `workers` processes; returns when all are done.

    Raises:
        UserError: A worker met bad input, or died.
        RuntimeError: A worker failed otherwise; carries its traceback.
    """
    todo = deque(tasks)
    staff = _Staff(work, workers)
    try:
        while todo or staff.is_busy:
            for member in staff.ready(bool(todo)):
                if not member.is_busy:
                    member.give(todo.popleft())
                    continue
                answer = member.answer()
                if isinstance(answer, Counts):
                    made(answer)
    finally:
        staff.dismiss()
        work.directory.remove_leftovers()  # a worker may have been ended between writing and renaming


class _Member:
    """One worker as the master sees it."""

    def __init__(self, process: SpawnProcess, pipe: Connection) -> None:
        self.process = process
        self.pipe = pipe
        self.task: int | None = None

    @property
    def is_busy(self) -> bool:
        """Whether it has a task."""
        return self.task is not None

    def give(self, task: int) -> None:
        """Hands it a task."""
        self.task = task
        with suppress(BrokenPipeError):  # it is dead: its answer will say so
            self.pipe.send(task)

    def answer(self) -> Counts | None:
        """What it has made since, or None when its task is done.

        Raises:
            UserError: It met bad input, or died.
            RuntimeError: It failed otherwise.
        """
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(PATIENCE_S)
            code = self.process.exitcode
            reason = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with code {code}"
            raise UserError(
                f"prepare: worker {self.process.pid} {reason} in task {self.task} (out of memory?); run the same "
                "command again to continue, with fewer --workers"
            ) from None
        if isinstance(answer, UserError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"prepare worker failed in task {self.task}:\n{answer}")
        if answer is None:
            self.task = None
        return answer


class _Staff:
    """All workers."""

    def __init__(self, work: Work, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._members: list[_Member] = []
        try:
            for number in range(workers):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there, work), name=f"prepare-{number}")
                with _environment(number):
                    process.start()
                there.close()  # so that the pipe breaks with the worker
                self._members.append(_Member(process, here))
        except BaseException:
            self.dismiss()
            raise

    @property
    def is_busy(self) -> bool:
        """Whether any has a task."""
        return any(member.is_busy for member in self._members)

    def ready(self, has_tasks: bool) -> Iterator[_Member]:
        """Those to deal with: one without a task if there are tasks, else those that have something to say."""
        free = [member for member in self._members if not member.is_busy]
        if has_tasks and free:
            yield free[0]
            return
        busy = {member.pipe: member for member in self._members if member.is_busy}
        for pipe in wait(list(busy)):
            yield busy[pipe]  # type: ignore[index]

    def dismiss(self) -> None:
        """Ends all: at once where nothing is under way, else they drop what they are writing."""
        for member in self._members:
            if member.is_busy and member.process.is_alive():
                member.process.terminate()
            member.pipe.close()
        for member in self._members:
            member.process.join(PATIENCE_S)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()


@contextmanager
def _environment(number: int) -> Iterator[None]:
    """What a worker finds: which device is its own, one thread for sums, and no ears for Ctrl-C while it starts."""
    wanted = {"LOCAL_RANK": str(number), **ONE_THREAD}
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, work: Work) -> None:
    """What a worker does: tasks, until the master hangs up or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = pipe.recv()
            try:
                do_task(work, task, pipe.send)
                pipe.send(None)
            except UserError as error:
                pipe.send(UserError(str(error)))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception:
                pipe.send(traceback.format_exc())
    os._exit(0)  # nothing is open; taking torch apart in order costs a second


def _leave(*_: object) -> NoReturn:
    raise SystemExit(0)
