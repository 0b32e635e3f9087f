"""Which documents were in a global batch, and in which batches a sample was: asked of the plan, no sample is read.

Steps are counted as the run's logs count them: step 1 is the first, and the batch of step n lies in rows
(n - 1) * global_batch_size and on of the plan.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.manifest import Source
from data_pipeline.plan.open import OpenData
from data_pipeline.plan.plan import Plan, PlanEnded, PlannedRows
from data_pipeline.stream.choices import Choices
from data_pipeline.tar_scan import BLOCK, parse_header, scan_tar
from data_pipeline.uid import uid_text, uid_words

_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedDocument:
    """One document of a global batch: what it is, where its bytes are, who trained on it."""

    step: int
    """As logs count them, from 1."""
    row: int
    """Row number of the plan."""
    dp_rank: int
    """Rank that the row is dealt to."""
    micro_batch: int
    """Which of that rank's micro-batches, from 0."""
    source: str
    task: str
    uid: str
    sample: int
    """Number within the source."""
    epoch: int
    """How often the source was gone through before."""
    start: int
    """First token taken of the sample's document."""
    tokens: int
    """Tokens taken."""
    images_understood: int
    images_drawn: int
    dropped_prompt: bool
    """Whether guidance dropout hid the prompt."""
    variant: int
    """Which of the stored crops is drawn."""
    shard: str
    """Path of the tar."""
    key: str
    """WebDataset key of the sample or of the record that holds it."""
    offset: int
    """First byte of the sample in the tar."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows are dealt."""

    dp_size: int = 1
    micro_batch_size: int = 1


def blame_step(data: OpenData, step: int, layout: Layout | None = None) -> list[UsedDocument]:
    """Documents of the batch of a step, in the order of its rows.

    Args:
        data: Plan and sources.
        step: From 1.
        layout: Ranks and micro-batches that rows are dealt to; their number changes nothing else.

    Raises:
        UserError: There is no such step, or a shard cannot be read.
    """
    layout = layout or Layout()
    rows = rows_of_step(data.plan, step)
    places = _places(data.plan, step, layout)
    planned = _planned_rows(data.plan, rows)
    dropped, variants = _choices(data, planned)
    keys = KeyFinder(data.sources)
    documents = []
    for at, row in enumerate(rows):
        for number in range(int(planned.row_start[at]), int(planned.row_start[at + 1])):
            source_no, sample = int(planned.source_no[number]), int(planned.sample_no[number])
            source, spec = data.sources[source_no], data.plan.sources[source_no]
            shard, _ = source.place_of(sample)
            rank, micro_batch = places[row]
            documents.append(
                UsedDocument(
                    step=step,
                    row=row,
                    dp_rank=rank,
                    micro_batch=micro_batch,
                    source=spec.name,
                    task=spec.task.value,
                    uid=source.uid(sample),
                    sample=sample,
                    epoch=int(planned.epoch[number]),
                    start=int(planned.start[number]),
                    tokens=int(planned.length[number]),
                    images_understood=int(source.num_und_images[sample]),
                    images_drawn=int(source.num_gen_images[sample]),
                    dropped_prompt=bool(dropped[number]),
                    variant=int(variants[number]),
                    shard=str(source.shard_path(shard)),
                    key=keys.key(source_no, sample),
                    offset=int(source.offset[sample]),
                )
            )
    return documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One time that a sample, or a piece of it, is trained on."""

    step: int
    """From 1."""
    row: int
    source: str
    sample: int
    epoch: int
    start: int
    tokens: int


def find_uses(data: OpenData, uid: str, steps: range) -> list[Use]:
    """Every use of a uid in some steps (counted from 1), in the order of training.

    Goes through the plan a window at a time; a plan that ends within the steps is searched to its end.

    Raises:
        UserError: The uid is no 32 hex digits, no source that takes part holds it, or the first step does not exist.
    """
    samples = samples_of(data.sources, uid)
    if not any(len(numbers) for numbers in samples):
        names = ", ".join(source.name for source in data.plan.sources)
        raise UserError(f"uid {uid}: no sample of {names} has it; look for it with `janus-mega data inspect DIR --uid`")
    batch = data.plan.global_batch_size
    first, last = rows_of_step(data.plan, steps.start).start, (steps.stop - 1) * batch
    uses: list[Use] = []
    while first < last:
        # up to the end of the window: the plan keeps a few windows only
        stop = min(last, (first // data.plan.window_rows + 1) * data.plan.window_rows, first + _ROWS_AT_ONCE)
        try:
            planned = data.plan.rows(range(first, stop))
        except PlanEnded:
            break
        uses += _uses_in(data.plan, planned, first, samples)
        first = stop
    return uses


def _uses_in(plan: Plan, planned: PlannedRows, first_row: int, samples: Sequence[np.ndarray]) -> list[Use]:
    """Uses of given samples (per source) among planned rows."""
    found = np.zeros(len(planned.source_no), bool)
    for number, wanted in enumerate(samples):
        if len(wanted):
            found |= (planned.source_no == number) & np.isin(planned.sample_no, wanted)
    uses = []
    for at in np.flatnonzero(found).tolist():
        row = first_row + int(np.searchsorted(planned.row_start, at, "right")) - 1
        use = Use(
            step=row // plan.global_batch_size + 1,
            row=row,
            source=plan.sources[int(planned.source_no[at])].name,
            sample=int(planned.sample_no[at]),
            epoch=int(planned.epoch[at]),
            start=int(planned.start[at]),
            tokens=int(planned.length[at]),
        )
        uses.append(use)
    return uses


def samples_of(sources: Sequence[Source], uid: str) -> list[np.ndarray]:
    """Per source the numbers of the samples that have a uid.

    Raises:
        UserError: It is no 32 hex digits.
    """
    uid = uid.lower()
    if uid_text(uid) != uid:
        raise UserError(f"--uid {uid!r} is no uid; give 32 hex digits, as `janus-mega data inspect` shows them")
    high, low = uid_words([uid])[0]
    return [np.flatnonzero((source.uids[:, 0] == high) & (source.uids[:, 1] == low)) for source in sources]


def rows_of_step(plan: Plan, step: int) -> range:
    """Row numbers of the batch of a step that is counted from 1.

    Raises:
        UserError: There is no such step.
    """
    if step < 1:
        raise UserError(f"--step {step}: steps are counted from 1, as in metrics.jsonl; give 1 or more")
    return range((step - 1) * plan.global_batch_size, step * plan.global_batch_size)


def _planned_rows(plan: Plan, rows: range) -> PlannedRows:
    try:
        return plan.rows(rows)
    except PlanEnded as ended:
        raise UserError(
            f"--step {rows.start // plan.global_batch_size + 1}: the plan has {ended.step} steps ({ended.why}); give "
            "one of those"
        ) from ended


def _places(plan: Plan, step: int, layout: Layout) -> dict[int, tuple[int, int]]:
    """(rank, micro-batch) of every row of a step.

    Raises:
        UserError: There is no such step, or it cannot be dealt to this layout.
    """
    _planned_rows(plan, range((step - 1) * plan.global_batch_size, (step - 1) * plan.global_batch_size + 1))
    try:
        placed = plan.place(step - 1, layout.dp_size, layout.micro_batch_size)
    except ValueError as error:
        raise UserError(f"{error}; give another --world-size") from error
    return {
        int(row): (rank, micro_batch)
        for rank, micro_batches in enumerate(placed)
        for micro_batch, rows in enumerate(micro_batches)
        for row in rows
    }


def _choices(data: OpenData, planned: PlannedRows) -> tuple[np.ndarray, np.ndarray]:
    """What chance decided: dropped prompts (bool) and variants (int64) of all documents."""
    choices = Choices(data.spec)
    dropped, variants = np.zeros(len(planned.source_no), bool), np.zeros(len(planned.source_no), np.int64)
    for number, source in enumerate(data.sources):
        mine = np.flatnonzero(planned.source_no == number)
        dropped[mine] = choices.drops_prompt(source, planned.sample_no[mine], planned.epoch[mine])
        variants[mine] = choices.variant(source, planned.sample_no[mine], planned.epoch[mine])
    return dropped, variants


class KeyFinder:
    """WebDataset keys of samples, from the tars' headers."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._records: dict[tuple[int, int], tuple[list[int], list[str]]] = {}

    def key(self, source_no: int, sample: int) -> str:
        """Key of the sample, or of the record that holds it; nothing where its header is damaged.

        Raises:
            UserError: The shard cannot be read.
        """
        source = self._sources[source_no]
        shard, _ = source.place_of(sample)
        path, offset = source.shard_path(shard), int(source.offset[sample])
        try:
            if source.kind == "interleaved":
                with path.open("rb") as tar:
                    tar.seek(offset)
                    member = parse_header(tar.read(BLOCK), offset)
                return _key_of(member.name) if member else ""
            if (source_no, shard) not in self._records:
                members = [member for member in scan_tar(path) if member.name.endswith(".tok.npy")]
                keys = [_key_of(member.name) for member in members]
                self._records[source_no, shard] = [member.data for member in members], keys
            starts, keys = self._records[source_no, shard]
            at = bisect_right(starts, offset) - 1
            return keys[at] if at >= 0 else ""
        except ValueError:
            return ""  # a damaged tar still has its index; `verify` is who complains
        except OSError as error:
            raise UserError(f"{path}: the shard cannot be opened ({error.strerror}); copy it again") from error


def _key_of(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.split(".", 1)[0]


def as_json_values(documents: Sequence[UsedDocument] | Sequence[Use]) -> list[dict[str, Any]]:
    """Ready for JSON."""
    return [asdict(document) for document in documents]
