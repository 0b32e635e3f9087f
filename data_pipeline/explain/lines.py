"""What the explaining commands say, as lines of text for a terminal of any width."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from data_pipeline.explain.blame import Use, UsedDocument
from data_pipeline.explain.doctor import DoctorReport
from data_pipeline.explain.findings import EXPLANATIONS, Harm
from data_pipeline.explain.verify import Verification

_PLACES_SHOWN = 5
_USES_SHOWN = 50


def doctor_lines(report: DoctorReport) -> Iterator[str]:
    """Findings by kind, the worst first: what it is, what webdataset makes of it, the fix, the first places."""
    findings = report.findings
    yield (
        f"{report.num_shards:,} tars, {report.num_members:,} members, {report.num_samples:,} samples, "
        f"{report.num_bytes / 2**20:,.1f} MiB"
    )
    order = list(Harm)
    for code in sorted(findings.counts, key=lambda code: (order.index(EXPLANATIONS[code].harm), code)):
        explanation = EXPLANATIONS[code]
        yield ""
        yield f"{findings.counts[code]:,} x {explanation.title} [{explanation.harm.value}] {code}"
        yield f"  webdataset  {explanation.webdataset}"
        yield f"  fix         {explanation.fix}"
        places = [finding for finding in findings.kept if finding.code == code]
        for finding in places[:_PLACES_SHOWN]:
            member = f" {finding.member!r}" if finding.member else ""
            yield f"  at          {finding.shard}:{finding.at}{member}{': ' if finding.detail else ''}{finding.detail}"
        if findings.counts[code] > _PLACES_SHOWN:
            yield f"              and {findings.counts[code] - _PLACES_SHOWN:,} more; --json lists them"
    yield ""
    if not report.are_uids_complete:
        yield "not all samples were compared for equal uids: there are too many to be held in memory"
    harmless = sum(findings.counts.values()) - findings.num_harmful
    if findings.num_harmful:
        yield f"{findings.num_harmful:,} findings that cost samples or safety, {harmless:,} oddities"
    else:
        yield f"nothing that costs samples or safety, {harmless:,} oddities"


def verification_lines(found: Verification) -> Iterator[str]:
    """A table of all problems, then one line of what was compared."""
    if found.problems:
        width = min(max(len(problem.file) for problem in found.problems), 40)
        place_width = min(max(len(problem.place) for problem in found.problems), 52)
        for problem in found.problems:
            yield f"{problem.file:<{width}}  {problem.place:<{place_width}}  {problem.problem}"
    compared = f"{found.num_shards:,} shards, {found.num_samples:,} samples, {found.num_bytes / 2**20:,.1f} MiB"
    result = f"{len(found.problems):,} problems" if found.problems else "as the manifest says"
    yield f"{found.path}: {compared}: {result}"


def blame_lines(documents: Sequence[UsedDocument], *, shows_ranks: bool) -> Iterator[str]:
    """Documents of a batch, row after row."""
    tokens = sum(document.tokens for document in documents)
    images = sum(document.images_understood for document in documents)
    drawn = sum(document.images_drawn for document in documents)
    step = documents[0].step if documents else 0
    yield f"step {step}: {len(documents):,} documents, {tokens:,} tokens, {images:,} images understood, {drawn:,} drawn"
    width = max([6, *(len(document.source) for document in documents)])
    for row, group in groupby(documents, key=lambda document: document.row):
        members = list(group)
        where = f", rank {members[0].dp_rank}, micro-batch {members[0].micro_batch}" if shows_ranks else ""
        yield ""
        yield f"row {row}{where}: {sum(document.tokens for document in members):,} tokens"
        for document in members:
            piece = f" from token {document.start}" if document.start else ""
            notes = " prompt dropped" if document.dropped_prompt else ""
            yield (
                f"  {document.source:<{width}} {document.task:<13} {document.uid} {document.tokens:>6} tokens{piece}, "
                f"epoch {document.epoch}, {document.shard}:{document.offset} key {document.key}{notes}"
            )


def use_lines(uid: str, uses: Sequence[Use], steps: range) -> Iterator[str]:
    """Steps that used a sample."""
    yield f"uid {uid}: {len(uses):,} uses in steps {steps.start} to {steps.stop - 1}"
    for use in uses[:_USES_SHOWN]:
        piece = f" from token {use.start}" if use.start else ""
        yield (
            f"  step {use.step:>8}  row {use.row:>10}  {use.source} sample {use.sample}, epoch {use.epoch}, "
            f"{use.tokens} tokens{piece}"
        )
    if len(uses) > _USES_SHOWN:
        yield f"  and {len(uses) - _USES_SHOWN:,} more; --json lists them"
