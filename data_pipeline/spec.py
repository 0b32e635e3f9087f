"""What the data side is told: sources, mixture, tokenizers, image geometry, packing.

Plain frozen dataclasses without methods; `janus_mega.config.schema` composes them into a run, and the data commands
use them alone. Rules over several fields live in `janus_mega.config.validate`, arithmetic in `derive`.
The string below each field is its documentation (meaning, unit); `janus-mega config --explain` prints it.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

MISSING: Any = "???"
"""A value that a run must give (omegaconf's marker, spelled here so that specs need no omegaconf)."""


class Task(Enum):
    """What a document teaches; losses, counts and ratios are kept apart by it. The value is the id in batches."""

    text = "text"
    understanding = "understanding"
    generation = "generation"


class RatioUnit(Enum):
    """What mixture weights are shares of; `rows` makes every row hold documents of one source alone."""

    tokens = "tokens"
    samples = "samples"
    rows = "rows"


class ScheduleUnit(Enum):
    """What the points of weight schedules count."""

    step = "step"
    token = "token"


class Shape(Enum):
    """How a weight comes from one point of its schedule to the next."""

    step = "step"
    linear = "linear"
    cosine = "cosine"


class Exhausted(Enum):
    """What happens when a source has given its last allowed epoch.

    `stop` ends the data, `reweight` leaves the source out from then on, `error` refuses the run before it starts.
    """

    stop = "stop"
    reweight = "reweight"
    error = "error"


class Captions(Enum):
    """Which captions of a picture an epoch holds: all of them, or one chosen anew each epoch."""

    all = "all"
    one = "one"


class Template(Enum):
    """Dialogue template: `deepseek_old` is Janus-1.3B's (User: / Assistant:), `deepseek` is Janus-Pro's."""

    deepseek_old = "deepseek_old"
    deepseek = "deepseek"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageGeometry:
    """Sizes that fix how many tokens an image costs in either pathway."""

    understanding_size: int = 384
    """Side of the square picture the understanding encoder sees, pixels."""
    understanding_tokens: int = 576
    """Tokens one understood image occupies, (side / patch)^2."""
    generation_size: int = 384
    """Side of the square picture the image tokenizer encodes, pixels."""
    generation_tokens: int = 576
    """Ids of one drawn image, (side / downsampling)^2."""
    codebook_size: int = 16384
    """Number of image ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightPoint:
    """A weight that holds from some moment on."""

    at: float = MISSING
    """Steps or tokens trained before it holds, as data.schedule_unit says."""
    weight: float = MISSING
    """The weight from there on."""
    shape: Shape = Shape.step
    """How it is reached from the point before: at once, or gradually."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSpec:
    """One directory of shards and how it enters the mixture."""

    path: str = MISSING
    """Directory that holds janus.json, index/ and shards/."""
    task: Task = Task.text
    """Which loss its documents feed."""
    weight: float = 1.0
    """Share of this source; weights are relative, 0 leaves the source out."""
    schedule: list[WeightPoint] = field(default_factory=list)
    """Later weights in ascending order of `at`; `weight` holds before the first of them."""
    max_epochs: float = 0.0
    """How often the source may be gone through at most; 0 sets no limit."""
    on_exhausted: Exhausted = Exhausted.error
    """What happens when max_epochs are used up."""
    masks: list[str] = field(default_factory=list)
    """Masks of the source (`janus-mega data mask` writes them) whose samples are left out."""
    captions: Captions = Captions.all
    """Which captions of a picture with several an epoch holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """Everything the compiled plan and the assembly of rows depend on."""

    sources: dict[str, SourceSpec] = field(default_factory=dict)
    """Sources by name; a dict so that an override touches one entry."""
    text_tokenizer: str = MISSING
    """Path of the text tokenizer: a sentencepiece .model file or a directory with tokenizer.json."""
    image_tokenizer: str = ""
    """Directory of the image tokenizer whose ids the generation sources hold; checkpoints carry a copy, without which
    they can be neither exported nor drawn with."""
    geometry: ImageGeometry = field(default_factory=ImageGeometry)
    """Token cost of images; must equal what the shards were written with."""
    template: Template = Template.deepseek
    """Dialogue template of question-answer and generation documents."""
    ratio_unit: RatioUnit = RatioUnit.tokens
    """What the weights of sources are shares of."""
    temperature: float = 0.0
    """0 takes weights as shares; T above 0 makes shares proportional to weight x size^(1/T), size in the ratio unit."""
    schedule_unit: ScheduleUnit = ScheduleUnit.step
    """What the points of weight schedules count."""
    seq_len: int = 4096
    """Tokens per packed row."""
    seed: int = 0
    """Fixes order, packing and every random choice of the data side."""
    guidance_dropout: float = 0.1
    """Share of generation documents whose prompt becomes pad tokens (all but bos and begin-of-image)."""
    num_workers: int = 0
    """Loader processes per rank; 0 reads in the training process. Never changes what is read."""
    window_rows: int = 1024
    """Rows planned at a time: mixture and packing are exact within a window. More rows leave less padding; epochs of a
    source that ends inside a window mix there, so a window should hold less than an epoch of what is small."""
    cache_mib: int = 256
    """Memory per loader process for decoded documents of sources with pictures that are small enough to be held whole,
    MiB; 0 reads every sample anew. Never changes what is read."""
    max_broken_samples: int = 100
    """Damaged samples of a run, over all ranks, that become masked holes before it stops; 0 stops at the first."""
