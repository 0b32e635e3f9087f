"""What every prepare command can be told, and what it tells back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

Progress = Callable[[int, int], None]
"""Called with (records done, records in all) as work goes on."""


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
    """Samples per block record (text and t2i)."""
    encode_batch_size: int = 64
    """Pictures handed to the image tokenizer at a time (t2i)."""
    max_document_tokens: int = 0
    """Longer texts become several documents (text); 0 keeps them whole and leaves cutting to the plan."""
    on_bad: OnBad = OnBad.error
    """What becomes of a broken record."""


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
    rejects: dict[str, int] = field(default_factory=dict)
    """Records left out, by reason."""
