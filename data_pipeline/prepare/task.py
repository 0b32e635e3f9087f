"""One task: a fixed slice of the records, through a preparer, to one shard. Nothing outside the slice enters."""

import errno
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.prepare.directory import Facts, ShardDirectory
from data_pipeline.prepare.options import Counts, OnBad
from data_pipeline.prepare.records import RawRecord, RecordSource, Reject
from data_pipeline.prepare.shard import ShardWriter

REPORT_EVERY_S = 0.2
"""How often a task says how far it is."""


class Preparer(ABC):
    """One kind of shards: turns raw records into samples. It pickles, for processes that start afresh.

    `add` is called for every record in order. A preparer that works ahead (it reads and decodes in threads, say) hears
    of each record `lookahead` records before its turn.
    """

    facts: Facts
    """For the manifest."""
    lookahead: int = 0
    """Records that are announced before the one to add."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What its output depends on besides the options and the input, ready for JSON."""

    def announce(self, record: RawRecord) -> None:  # noqa: B027 - most kinds have nothing to do here
        """Hears of a record that will be added later."""

    @abstractmethod
    def add(self, record: RawRecord, writer: ShardWriter) -> None:
        """Adds the samples of a record.

        Raises:
            Reject: The record cannot be used.
        """

    def end_shard(self, writer: ShardWriter) -> None:  # noqa: B027
        """Writes what is still held back for this shard."""

    def abandon(self) -> None:  # noqa: B027
        """Forgets what is held back: the shard will not be finished."""


@dataclass(frozen=True, slots=True)
class Work:
    """All that a process needs to do any task."""

    preparer: Preparer
    source: RecordSource
    directory: ShardDirectory
    num_records: int
    records_per_task: int
    on_bad: OnBad

    @property
    def num_tasks(self) -> int:
        """Tasks of the whole input."""
        return -(-self.num_records // self.records_per_task)

    def slice_of(self, task: int) -> range:
        """Numbers of a task's records."""
        return range(task * self.records_per_task, min((task + 1) * self.records_per_task, self.num_records))


def do_task(work: Work, task: int, made: Callable[[Counts], None]) -> None:
    """Writes a task's shard and part of the index.

    Args:
        work: Everything.
        task: Its number.
        made: Told what has been made since it was told last.

    Raises:
        UserError: A broken record (unless skipped), or the disk is full.
    """
    numbers = work.slice_of(task)
    writer = ShardWriter(work.directory.shard_path(task))
    meter = _Meter(writer, made)
    try:
        for record in _announced(work.preparer, work.source.read(numbers.start, numbers.stop)):
            try:
                work.preparer.add(record, writer)
            except Reject as reject:
                if work.on_bad is OnBad.error:
                    raise UserError(
                        f"{record}: {reject}; correct or remove the record, or pass --on-bad skip to leave such out"
                    ) from reject
                writer.rejects[reject.reason] += 1
            meter.tick()
        work.preparer.end_shard(writer)
        work.directory.commit(task, writer)
    except BaseException as error:
        work.preparer.abandon()
        writer.abandon()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{writer.path}: {error.strerror}; make room and run the same command again") from error
        raise
    meter.tell()


def _announced(preparer: Preparer, records: Iterable[RawRecord]) -> Iterator[RawRecord]:
    """The records, each announced in time."""
    waiting: deque[RawRecord] = deque()
    for record in records:
        preparer.announce(record)
        waiting.append(record)
        if len(waiting) > preparer.lookahead:
            yield waiting.popleft()
    yield from waiting


class _Meter:
    """Tells every now and then what a writer has received."""

    def __init__(self, writer: ShardWriter, made: Callable[[Counts], None]) -> None:
        self._writer = writer
        self._made = made
        self._records = 0
        self._told = Counts()
        self._told_at_s = time.monotonic()

    def tick(self) -> None:
        """One record more is done."""
        self._records += 1
        if time.monotonic() - self._told_at_s >= REPORT_EVERY_S:
            self.tell()

    def tell(self) -> None:
        """Tells what is new."""
        writer, told = self._writer, self._told
        now = Counts(
            self._records, writer.num_samples, writer.num_text_tokens, writer.num_images, Counter(writer.rejects)
        )
        self._made(
            Counts(
                now.records - told.records,
                now.samples - told.samples,
                now.text_tokens - told.text_tokens,
                now.images - told.images,
                now.rejects - told.rejects,
            )
        )
        self._told, self._told_at_s = now, time.monotonic()
