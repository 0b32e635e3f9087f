"""Finds what webdataset swallows, in anybody's tars: streams through them once and explains every finding.

Nothing is unpacked and nothing is believed: sizes are capped before they are read, pictures are judged by their headers
before they are decoded, and after damage the walk goes on where another header is found. Memory holds one member and
the tables of `grouping`.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.explain.findings import EXPLANATIONS, Findings
from data_pipeline.explain.grouping import SampleGrouper, UidTable
from data_pipeline.explain.member_checks import CheckOptions, check_content, check_name, last_extension, split_name
from data_pipeline.explain.tar_walk import Damage, Entry, walk_tar
from data_pipeline.manifest import MANIFEST_NAME
from data_pipeline.npy import array_of

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAX_UID_BYTES = 64 << 20
_MEMBERS_PER_REPORT = 1000

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""


@dataclass(frozen=True, slots=True)
class DoctorReport:
    """What was looked at, and what was found."""

    num_shards: int
    num_members: int
    num_samples: int
    """As webdataset would give them."""
    num_bytes: int
    findings: Findings
    are_uids_complete: bool
    """Whether all samples were compared for equal uids."""


def examine(
    paths: Iterable[str | Path], options: CheckOptions | None = None, progress: Progress | None = None
) -> DoctorReport:
    """Examines tars and directories of tars.

    Raises:
        UserError: A path is missing, is neither a tar nor a directory, or no tar is found.
    """
    options = options or CheckOptions()
    shards = find_tars(paths)
    findings, uids = Findings(options.limit), UidTable()
    sizes = [shard.stat().st_size for shard in shards]
    num_members = num_samples = done = 0
    total = sum(sizes)
    for shard, size in zip(shards, sizes, strict=True):
        for members, samples, reached in _examine_shard(shard, size, options, findings, uids):
            num_members, num_samples = num_members + members, num_samples + samples
            if progress:
                progress(done + reached, total)
        done += size
    uids.report(findings)
    return DoctorReport(len(shards), num_members, num_samples, sum(sizes), findings, not uids.is_full)


def find_tars(paths: Iterable[str | Path]) -> list[Path]:
    """The tars that are meant: files as they are, directories with all tars below them, in order.

    Raises:
        UserError: A path is missing, or there is no tar at all.
    """
    shards: list[Path] = []
    for given in map(Path, paths):
        if given.is_file():
            shards.append(given)
        elif given.is_dir():
            names = (".tar", *_COMPRESSED_NAMES)
            found = sorted(path for path in given.rglob("*") if path.name.endswith(names) and path.is_file())
            if not found:
                raise UserError(f"{given}: no .tar in this directory; give tars, or a directory that holds some")
            shards += found
        else:
            raise UserError(f"{given}: no such file or directory; give tars, or a directory that holds some")
    if not shards:
        raise UserError("no tar was given; give tars, or a directory that holds some")
    return shards


def _examine_shard(
    path: Path, size: int, options: CheckOptions, findings: Findings, uids: UidTable
) -> Iterator[tuple[int, int, int]]:
    """Yields (members, samples, bytes reached) of parts of a shard: members as they are counted, samples at its end."""
    shard = str(path)
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from error
    with stream:
        compression = _compression(stream.read(8))
        if compression:
            findings.add("compressed", shard, "", 0, f"{compression}; its members were not looked at")
            yield 0, 0, size
            return
        uids.begin_shard(shard, _scope(path))
        grouper = SampleGrouper(shard, findings, uids)
        num_members, is_damaged = 0, False
        for item in walk_tar(stream, size):
            if isinstance(item, Damage):
                is_damaged = True
                findings.add(item.code, shard, item.name, item.at, item.detail)
                if item.code != "missing_end":
                    grouper.interrupt()
                continue
            num_members += 1
            _examine_member(item, stream, options, findings, (grouper, uids, shard))
            if num_members % _MEMBERS_PER_REPORT == 0:
                yield _MEMBERS_PER_REPORT, 0, item.end
        if not num_members and not is_damaged:
            findings.add("empty_tar", shard, "", 0, "end-of-archive blocks and nothing else")
        grouper.finish()
        yield num_members % _MEMBERS_PER_REPORT, grouper.num_samples, size


def _scope(shard: Path) -> str:
    """Within what uids must differ: a prepared source, else all tars given (two sources may show the same images)."""
    roots = [folder for folder in (shard.parent, shard.parent.parent) if (folder / MANIFEST_NAME).is_file()]
    return str(roots[0]) if roots else ""


def _examine_member(
    entry: Entry,
    stream: io.BufferedReader,
    options: CheckOptions,
    findings: Findings,
    shard: tuple[SampleGrouper, UidTable, str],
) -> None:
    grouper, uids, name_of_shard = shard
    for code, detail in check_name(entry):
        findings.add(code, name_of_shard, entry.name, entry.header, detail)
    cut = split_name(entry.name)
    if not entry.is_file or cut is None:
        return
    key, extension = cut

    def read(start: int, size: int) -> bytes:
        stream.seek(entry.data + start)
        return stream.read(size)

    content = check_content(entry, last_extension(extension), read, options)
    for code, detail in content.findings:
        findings.add(code, name_of_shard, entry.name, entry.header, detail)
    if extension == "uid.npy" and not content.findings and entry.size <= _MAX_UID_BYTES:
        for uid in _distinct_uids(read(0, entry.size)):
            uids.add(uid, entry.header)
    grouper.add(key, extension, entry.name, entry.header, content.uids)


def _distinct_uids(content: bytes) -> list[str]:
    """The uids of a block record; captions of one picture share theirs."""
    try:
        words = array_of(content)
    except ValueError:
        return []
    if words.ndim != 2 or words.shape[1] != 2:
        return []
    return [f"{high:016x}{low:016x}" for high, low in dict.fromkeys(map(tuple, words.tolist()))]


def _compression(head: bytes) -> str:
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), "")


def report_values(report: DoctorReport) -> dict[str, Any]:
    """A report ready for JSON: counts, every finding that was kept, and what each kind means."""
    findings = report.findings
    return {
        "num_shards": report.num_shards,
        "num_members": report.num_members,
        "num_samples": report.num_samples,
        "num_bytes": report.num_bytes,
        "are_uids_complete": report.are_uids_complete,
        "num_harmful": findings.num_harmful,
        "num_not_listed": findings.num_left_out,
        "counts": dict(sorted(findings.counts.items())),
        "kinds": {
            code: {"harm": kind.harm.value, "title": kind.title, "webdataset": kind.webdataset, "fix": kind.fix}
            for code, kind in EXPLANATIONS.items()
            if code in findings.counts
        },
        "findings": [asdict(finding) for finding in findings.kept],
    }
