"""What all prepare commands share: which tasks are left, who does them, and joining them once none is.

Tasks are fixed slices of the records, so one process, a pool of them (`workers`) and the jobs of a cluster's array
(`jobs`, `job`) write the same bytes. Whoever finds all tasks done joins them; that several do at once is no harm.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.manifest import Manifest
from data_pipeline.prepare.directory import ShardDirectory
from data_pipeline.prepare.inputs import describe_inputs
from data_pipeline.prepare.options import Counts, PrepareOptions, PrepareReport, Progress, Tally
from data_pipeline.prepare.pool import do_in_pool
from data_pipeline.prepare.records import open_records
from data_pipeline.prepare.task import Preparer, Work, do_task


def run_prepare(
    preparer: Preparer,
    inputs: Iterable[str | Path],
    out: Path,
    options: PrepareOptions,
    progress: Progress | None,
) -> PrepareReport:
    """Prepares a directory, or continues one; with several jobs, this job's share of it.

    Raises:
        UserError: Bad input, a broken record (unless skipped), or a directory made otherwise.
    """
    options.check()
    source = open_records(inputs, options.importing)
    preprocessing = preparer.facts.image_tokenizer.preprocessing if preparer.facts.image_tokenizer else ""
    directory = ShardDirectory(out, _settings(preparer, options), describe_inputs(source.files()), preprocessing)
    manifest = directory.read_manifest()
    if manifest is not None:
        return _report(manifest, out, len(manifest.shards))
    num_records = source.count()
    work = Work(preparer, source, directory, num_records, options.samples_per_shard, options.on_bad)
    mine = range(options.job, work.num_tasks, options.jobs)
    todo = [task for task in mine if not directory.is_done(task)]
    tally = Tally(
        records=sum(len(work.slice_of(task)) for task in mine),
        kept=sum(len(work.slice_of(task)) for task in mine) - sum(len(work.slice_of(task)) for task in todo),
    )
    _do(work, todo, min(options.workers, len(todo)), tally, progress)
    missing = set(range(work.num_tasks)) - directory.done_tasks()
    if missing and directory.read_manifest() is None:
        return _partial_report(preparer, directory, tally, len(mine), len(mine) - len(todo), len(missing))
    return _report(directory.finish(work.num_tasks, preparer.facts), out, len(mine) - len(todo))


def _do(work: Work, todo: list[int], workers: int, tally: Tally, progress: Progress | None) -> None:
    """Does tasks, here or in a pool."""

    def made(counts: Counts) -> None:
        tally.made.add(counts)
        if progress is not None:
            progress(tally)

    made(Counts())
    if workers > 1:
        do_in_pool(work, todo, workers, made)
        return
    for task in todo:
        do_task(work, task, made)


def _settings(preparer: Preparer, options: PrepareOptions) -> dict[str, Any]:
    """All that the output's bytes depend on besides the raw files."""
    return {
        "kind": preparer.facts.kind,
        "samples_per_shard": options.samples_per_shard,
        "on_bad": options.on_bad.value,
        **options.importing.settings(),
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


def _partial_report(
    preparer: Preparer, directory: ShardDirectory, tally: Tally, num_shards: int, kept: int, missing: int
) -> PrepareReport:
    """Of a job that is not the last: what it made itself."""
    return PrepareReport(
        path=directory.path,
        kind=preparer.facts.kind,
        num_samples=tally.made.samples,
        num_text_tokens=tally.made.text_tokens,
        num_images=tally.made.images,
        num_shards=num_shards,
        num_shards_kept=kept,
        num_shards_missing=missing,
        rejects=dict(sorted(tally.made.rejects.items())),
    )
