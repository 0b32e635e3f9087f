"""What every prepare command can be told, and what it tells back."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.prepare.importing import ImportOptions

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment in which sums are taken in one order: the last bit of an encoder's depends on the number of threads."""


class OnBad(Enum):
    """What becomes of a record that cannot be used: `error` stops and names it, `skip` counts it by reason."""

    error = "error"
    skip = "skip"


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareOptions:
    """Settings common to all kinds of shards."""

    samples_per_shard: int = 10_000
    """Raw records that one shard is made of; also the unit of restart."""
    record_size: int = 1_000
    """Samples per block record at most (text and t2i); the captions of one picture are never parted."""
    encode_batch_size: int = 64
    """Pictures handed to the image tokenizer at a time (t2i)."""
    crops: int = 1
    """Crops of each picture whose ids are stored (t2i): the middle one, then others along the long side."""
    flips: bool = False
    """Whether crops after the first may be mirrored (t2i)."""
    max_document_tokens: int = 0
    """Longer texts become several documents (text); 0 keeps them whole and leaves cutting to the plan."""
    on_bad: OnBad = OnBad.error
    """What becomes of a broken record."""
    importing: ImportOptions = field(default_factory=ImportOptions)
    """How the raw files are read."""
    workers: int = 1
    """Processes on this machine that share the work; 1 works in this one. Changes no byte of the output."""
    jobs: int = 1
    """Jobs, of a cluster's array say, that share the work. Changes no byte of the output."""
    job: int = 0
    """Which of them this is: it makes every `jobs`-th shard from here."""

    def check(self) -> None:
        """Checks the numbers.

        Raises:
            UserError: One is out of its range.
        """
        for name in ("samples_per_shard", "record_size", "encode_batch_size", "crops", "workers", "jobs"):
            if getattr(self, name) < 1:
                raise UserError(f"prepare: {name} = {getattr(self, name)} must be at least 1")
        if not 0 <= self.job < self.jobs:
            raise UserError(f"prepare: task {self.job} of {self.jobs} does not exist; tasks are 0 to {self.jobs - 1}")


@dataclass(slots=True)
class Counts:
    """What has been made of some records."""

    records: int = 0
    """Records that are done with, whatever became of them."""
    samples: int = 0
    text_tokens: int = 0
    images: int = 0
    """Pictures that were stored or encoded."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Records left out, by reason."""

    def add(self, other: "Counts") -> None:
        """Adds up."""
        self.records += other.records
        self.samples += other.samples
        self.text_tokens += other.text_tokens
        self.images += other.images
        self.rejects.update(other.rejects)


@dataclass(slots=True)
class Tally:
    """How far a prepare command is, over all its processes."""

    records: int
    """Records of its shards, of all that it is to make."""
    kept: int
    """Those of shards that an earlier call had finished."""
    made: Counts = field(default_factory=Counts)
    """What this call has made."""

    @property
    def done(self) -> int:
        """Records that need no more work."""
        return self.kept + self.made.records


Progress = Callable[[Tally], None]
"""Called as work goes on, every fraction of a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareReport:
    """What a prepare command did."""

    path: Path
    kind: str
    num_samples: int
    num_text_tokens: int
    num_images: int
    num_shards: int
    num_shards_kept: int
    """Shards that an earlier, interrupted call had finished."""
    num_shards_missing: int = 0
    """Shards that other jobs have not finished yet; there is no manifest before they do."""
    rejects: dict[str, int] = field(default_factory=dict)
    """Records left out, by reason."""
