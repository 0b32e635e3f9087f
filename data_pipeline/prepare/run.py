"""The loop that all prepare commands share: read records, do the tasks that are not done, finish the directory."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import UserError
from data_pipeline.manifest import Manifest
from data_pipeline.prepare.directory import Facts, ShardDirectory
from data_pipeline.prepare.options import OnBad, PrepareOptions, PrepareReport, Progress
from data_pipeline.prepare.records import RawRecord, Reject, count_records, input_files, read_records
from data_pipeline.prepare.shard import ShardWriter


class Preparer(Protocol):
    """One kind of shards: turns raw records into samples."""

    facts: Facts
    """For the manifest; complete once all tasks are done."""

    def settings(self) -> dict[str, Any]:
        """What its output depends on besides the options and the input, ready for JSON."""
        ...

    def add(self, record: RawRecord, writer: ShardWriter) -> None:
        """Adds the samples of a record.

        Raises:
            Reject: The record cannot be used.
        """
        ...

    def end_shard(self, writer: ShardWriter) -> None:
        """Writes what is still held back for this shard."""
        ...


def run_prepare(
    preparer: Preparer,
    inputs: Iterable[str | Path],
    out: Path,
    options: PrepareOptions,
    progress: Progress | None,
) -> PrepareReport:
    """Prepares a directory, or continues one.

    Raises:
        UserError: Bad input, a broken record (unless skipped), or a directory made otherwise.
    """
    files = input_files(inputs)
    directory = ShardDirectory(out, _settings(preparer, files, options))
    total = count_records(files)
    num_tasks = -(-total // options.samples_per_shard)
    if directory.manifest is not None:
        return _report(directory.manifest, out, len(directory.manifest.shards))
    kept = done = 0
    records = read_records(files)
    for task in range(num_tasks):
        batch = list(islice(records, options.samples_per_shard))
        if directory.is_done(task):
            kept += 1
            done += len(batch)
        else:
            done = _do_task(preparer, directory, task, batch, _Ticker(progress, done, total, options.on_bad))
        if progress is not None:
            progress(done, total)
    return _report(directory.finish(num_tasks, preparer.facts), out, kept)


class _Ticker:
    """Where the work stands, and what to do about a broken record."""

    def __init__(self, progress: Progress | None, done: int, total: int, on_bad: OnBad) -> None:
        self.progress = progress
        self.done = done
        self.total = total
        self.on_bad = on_bad

    def tick(self) -> None:
        """One record more is done."""
        self.done += 1
        if self.progress is not None and self.done % 64 == 0:
            self.progress(self.done, self.total)


def _do_task(
    preparer: Preparer, directory: ShardDirectory, task: int, records: Sequence[RawRecord], ticker: _Ticker
) -> int:
    """Writes one shard; returns how many records are done then."""
    writer = ShardWriter(directory.shard_path(task))
    try:
        for record in records:
            try:
                preparer.add(record, writer)
            except Reject as reject:
                if ticker.on_bad is OnBad.error:
                    raise UserError(
                        f"{record}: {reject}; correct or remove the record, or pass --on-bad skip to leave such out"
                    ) from reject
                writer.rejects[reject.reason] += 1
            ticker.tick()
        preparer.end_shard(writer)
        directory.commit(task, writer)
    except BaseException:
        writer.abandon()
        raise
    return ticker.done


def _settings(preparer: Preparer, files: list[Path], options: PrepareOptions) -> dict[str, Any]:
    """All that the output's bytes depend on. Inputs count by name and size, not by place."""
    return {
        "kind": preparer.facts.kind,
        "inputs": [[path.name, path.stat().st_size] for path in files],
        "samples_per_shard": options.samples_per_shard,
        "on_bad": options.on_bad.value,
        **preparer.settings(),
    }


def _report(manifest: Manifest, out: Path, kept: int) -> PrepareReport:
    return PrepareReport(
        path=out,
        kind=manifest.kind,
        num_samples=manifest.num_samples,
        num_text_tokens=manifest.num_text_tokens,
        num_images=manifest.num_und_images + manifest.num_gen_images,
        num_shards=len(manifest.shards),
        num_shards_kept=kept,
        rejects=dict(manifest.rejects),
    )
