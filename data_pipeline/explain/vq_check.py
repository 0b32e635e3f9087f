"""Whether stored image ids still mean the pictures they came from: some are cropped and encoded once more.

Finds ids of another tokenizer, another crop, pictures mixed up, and encoders whose sums differ from machine to machine.
Pictures are joined to ids by uid, from shards of documents or from raw records.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.images import ImageError
from data_pipeline.manifest import MANIFEST_NAME, ImageTokenizerEntry, Source, open_source
from data_pipeline.masks.lookup import UidIndex
from data_pipeline.plan.order import permutation, stream_key
from data_pipeline.prepare.crops import crops_of
from data_pipeline.prepare.encoding import ImageTokenizer
from data_pipeline.prepare.records import Reject, open_records
from data_pipeline.spec import ImageGeometry
from data_pipeline.stream.read import SampleReader
from data_pipeline.uid import uid_text

_WORST_LISTED = 5
_BATCH = 16

Progress = Callable[[int, int], None]
"""(pictures done, pictures in all)."""


class ImageCodec(ImageTokenizer, Protocol):
    """A frozen image tokenizer that also turns ids back into pictures."""

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Ids [n, num_tokens] to pictures uint8 [n, 3, image_size, image_size]."""
        ...


@dataclass(frozen=True, slots=True)
class PictureCheck:
    """One picture, all of its crops."""

    uid: str
    agreement: float
    """Share of equal ids."""
    psnr_db: float
    """Of the decoded stored ids against the crop, mean over crops."""


@dataclass(frozen=True, slots=True)
class VqCheck:
    """What a sample of pictures gave."""

    path: str
    num_asked: int
    num_found: int
    """Pictures that could be joined and decoded."""
    num_undecodable: int
    agreement: float
    """Share of equal ids over all pictures; 0 where none was found."""
    num_identical: int
    """Pictures all of whose ids are equal."""
    psnr_db: float
    """Mean over pictures."""
    min_psnr_db: float
    worst: tuple[PictureCheck, ...]
    """Those with the lowest agreement, then PSNR."""


def check_image_ids(
    path: str | Path,
    tokenizer: ImageCodec,
    images: Sequence[str | Path],
    *,
    num_pictures: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> VqCheck:
    """Encodes pictures of a t2i source again and compares.

    Args:
        path: The t2i source.
        tokenizer: The image tokenizer that its ids are said to come from.
        images: Shards of documents, or raw records, that hold the pictures.
        num_pictures: How many to take at random.
        seed: Which.
        progress: Told of pictures as they are done.

    Raises:
        UserError: No t2i source, another tokenizer (with both digests), or not one of its pictures is in `images`.
    """
    if num_pictures < 1:
        raise UserError(f"--sample {num_pictures} must be at least 1")
    source = open_source(path)
    entry = _entry_of(source, tokenizer.digest)
    chosen = _choose(source, num_pictures, seed)
    checks: list[PictureCheck] = []
    num_undecodable = 0
    pending: list[tuple[int, list[np.ndarray]]] = []
    for number, content in _pictures(source, chosen, images):
        try:
            crops = crops_of(
                content,
                source.uid(number),
                entry.image_size,
                entry.num_variants,
                bool(source.manifest.settings.get("flips")),
            )
        except ImageError:
            num_undecodable += 1
            continue
        pending.append((number, crops))
        if len(pending) == _BATCH:
            checks += _compare(source, entry, tokenizer, pending)
            pending = []
            if progress:
                progress(len(checks), len(chosen))
    if pending:
        checks += _compare(source, entry, tokenizer, pending)
    if not checks:
        given = ", ".join(map(str, images))
        raise UserError(
            f"{path}: none of {len(chosen)} pictures is in {given} by uid; give the records or shards "
            "that it was made of"
        )
    if progress:
        progress(len(chosen), len(chosen))
    return _summary(str(path), len(chosen), num_undecodable, checks)


def _entry_of(source: Source, digest: str) -> ImageTokenizerEntry:
    """What the manifest says of the image tokenizer, which must be the one of this digest."""
    entry = source.manifest.image_tokenizer
    if entry is None:
        raise UserError(f"{source.path}: is of kind {source.kind} and holds no image ids; give a t2i source")
    if entry.digest != digest:
        raise UserError(
            f"{source.path}: its image ids come from image tokenizer sha256 {entry.digest}, the one given is sha256 "
            f"{digest}; give the tokenizer that prepare used, or prepare the source again"
        )
    return entry


def _choose(source: Source, num_pictures: int, seed: int) -> np.ndarray:
    """Samples that begin an image, at random but always the same."""
    numbers = np.asarray(source.caption_number)
    begins = np.flatnonzero(numbers == 0)
    return np.sort(begins[permutation(stream_key("verify-vq", seed), len(begins))[:num_pictures]])


def _pictures(source: Source, chosen: np.ndarray, images: Sequence[str | Path]) -> Iterator[tuple[int, bytes]]:
    """(sample, picture file) of the chosen samples, each once, from the first input that has it."""
    left = {source.uid(int(number)): int(number) for number in chosen}
    raw: list[str | Path] = []
    for given in images:
        if not (Path(given) / MANIFEST_NAME).is_file():
            raw.append(given)
            continue
        yield from _from_shards(open_source(given), source, left)
    if raw and left:
        yield from _from_records(raw, left)


def _from_shards(pictures: Source, source: Source, left: dict[str, int]) -> Iterator[tuple[int, bytes]]:
    """From documents: the first picture of the document of that uid."""
    if pictures.kind != "interleaved":
        raise UserError(
            f"{pictures.path}: is of kind {pictures.kind} and holds no pictures; give documents or raw records"
        )
    reader = SampleReader(pictures, ImageGeometry())
    numbers = list(left.values())
    queries, samples = UidIndex(pictures.uids).find(source.uids[numbers])
    for query, sample in zip(queries.tolist(), samples.tolist(), strict=True):
        uid = source.uid(numbers[query])
        content = first_picture(reader, sample) if uid in left else None
        if content is not None:
            yield left.pop(uid), content


def first_picture(reader: SampleReader, sample: int) -> bytes | None:
    """The file of the first picture of a document; None where it has none."""
    endings = (".jpg", ".jpeg", ".png", ".webp")
    names = {f".{name}": content for name, content in reader.members(sample).items()}
    found = [name for name in sorted(names) if name.lower().endswith(endings)]
    return bytes(names[found[0]]) if found else None


def _from_records(inputs: Sequence[str | Path], left: dict[str, int]) -> Iterator[tuple[int, bytes]]:
    """From raw records, in their order."""
    records = open_records(inputs)
    for record in records.read(0, records.count()):
        if not left:
            return
        try:
            fields = record.fields()
            uid = uid_text(record.identity(fields))
            if uid in left:
                content = record.picture(fields.get("image"))
                yield left.pop(uid), content
        except Reject:
            continue  # prepare has told of it


def _compare(
    source: Source, entry: ImageTokenizerEntry, tokenizer: ImageCodec, pictures: Sequence[tuple[int, list[np.ndarray]]]
) -> Iterator[PictureCheck]:
    """Encodes and decodes the crops of some pictures."""
    reader = SampleReader(source, ImageGeometry())
    crops = np.stack([crop for _, some in pictures for crop in some])
    rows = [reader.read(number, variant).image_ids for number, some in pictures for variant in range(len(some))]
    stored = np.stack([row for row in rows if row is not None])
    equal = (tokenizer.encode(crops) == stored).mean(axis=1)
    psnr = [psnr_db(*pair) for pair in zip(tokenizer.decode(stored), crops, strict=True)]
    for at, (number, _) in enumerate(pictures):
        mine = slice(at * entry.num_variants, (at + 1) * entry.num_variants)
        yield PictureCheck(source.uid(number), float(equal[mine].mean()), float(np.mean(psnr[mine])))


def psnr_db(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal to noise of two uint8 pictures, dB; 100 for equal ones."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return min(10 * math.log10(255**2 / error), 100.0) if error else 100.0


def _summary(path: str, num_asked: int, num_undecodable: int, checks: Sequence[PictureCheck]) -> VqCheck:
    worst = sorted(checks, key=lambda check: (check.agreement, check.psnr_db))
    return VqCheck(
        path=path,
        num_asked=num_asked,
        num_found=len(checks),
        num_undecodable=num_undecodable,
        agreement=float(np.mean([check.agreement for check in checks])),
        num_identical=sum(check.agreement == 1 for check in checks),
        psnr_db=float(np.mean([check.psnr_db for check in checks])),
        min_psnr_db=min(check.psnr_db for check in checks),
        worst=tuple(worst[:_WORST_LISTED]),
    )


def vq_values(found: VqCheck) -> dict[str, Any]:
    """Ready for JSON."""
    return asdict(found)


def vq_lines(found: VqCheck) -> Iterator[str]:
    """The same for people."""
    yield f"{found.path}: {found.num_found:,} of {found.num_asked:,} pictures found by uid and encoded again"
    if found.num_undecodable:
        yield f"  {found.num_undecodable:,} do not decode any more"
    yield f"  equal ids         {found.agreement:.3%}, {found.num_identical:,} pictures in every id"
    yield f"  decoded to crop   {found.psnr_db:.2f} dB PSNR in the mean, {found.min_psnr_db:.2f} dB at worst"
    for check in found.worst:
        if check.agreement < 1:
            yield f"  {check.uid}  {check.agreement:.1%} equal ids, {check.psnr_db:.2f} dB"
