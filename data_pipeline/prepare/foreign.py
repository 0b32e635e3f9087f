"""An index of tars that somebody else wrote, where they lie: nothing is copied or rewritten.

The tars hold pictures with captions (`data_pipeline.pairs`). What prepare knows of its own shards is found here by
reading: byte range and crc32 of every key's members, tokens of the caption, size of the picture from its header, sha256
of every tar. The manifest says layout `pairs` and where the tars are; captions are tokenized again when they are read,
by the same tokenizer. A task is a tar, so a killed command continues, and several processes share the work.
"""

import dataclasses
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.dialogue import pair_text
from data_pipeline.errors import UserError
from data_pipeline.explain.picture_header import picture_size
from data_pipeline.images import MAX_PIXELS, ImageError
from data_pipeline.manifest import Manifest
from data_pipeline.pairs import PICKLED_EXTENSIONS, Pair, pair_caption, pair_identity, parse_facts, scan_pairs
from data_pipeline.prepare.directory import Facts, ShardDirectory
from data_pipeline.prepare.importers.pictures import MAX_PICTURE_BYTES
from data_pipeline.prepare.inputs import InputEntry, describe_inputs
from data_pipeline.prepare.meta import Meta, check_columns, sample_meta
from data_pipeline.prepare.options import OnBad
from data_pipeline.prepare.records import Reject
from data_pipeline.prepare.shard import ROW_DTYPE, token_dtype
from data_pipeline.text.interface import TextTokenizer
from data_pipeline.uid import uid_text, uid_words

Progress = Callable[[int, int], None]
"""Called with (tars done, tars in all)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndexOptions:
    """Settings of an index of foreign tars."""

    on_bad: OnBad = OnBad.error
    """What becomes of a pair without picture or caption, or with a picture that cannot be used."""
    keep_columns: tuple[str, ...] = ()
    """Further numbers of the .json to keep for masks."""
    workers: int = 1
    """Processes that share the work; changes no byte."""


def index_tars(
    inputs: Iterable[str | Path],
    out: str | Path,
    tokenizer: TextTokenizer,
    options: IndexOptions | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Writes <out>/janus.json and index for tars of others; continues where an earlier call was stopped.

    Args:
        inputs: Tars, or directories of them; all must lie in one directory.
        out: Directory to write.
        tokenizer: Its tokens are counted; runs must use the same.
        options: Settings.
        progress: Called as tars are done.

    Raises:
        UserError: No tar, tars of several directories, a damaged tar, or a bad pair (unless skipped).
    """
    options = options or IndexOptions()
    check_columns(options.keep_columns)
    tars = _tars_of(inputs)
    settings = {
        "kind": "pairs",
        "text_tokenizer": tokenizer.digest,
        "keep_columns": list(options.keep_columns),
        "on_bad": options.on_bad.value,
    }
    directory = TarsInPlace(Path(out), settings, tars)
    manifest = directory.read_manifest()
    if manifest is not None:
        return manifest
    todo = [task for task in range(len(tars)) if not directory.is_done(task)]
    _do(
        directory,
        todo,
        tokenizer,
        options,
        lambda done: progress(len(tars) - len(todo) + done, len(tars)) if progress else None,
    )
    facts = Facts(kind="interleaved", text_tokenizer=tokenizer.digest, token_dtype=token_dtype(tokenizer))
    return directory.finish(len(tars), facts)


class TarsInPlace(ShardDirectory):
    """Bookkeeping of an index whose tars lie elsewhere; one task a tar."""

    def __init__(self, path: Path, settings: dict[str, Any], tars: Sequence[Path]) -> None:
        """Begins or continues.

        Raises:
            UserError: The directory holds something else, or an index of other tars or with other settings.
        """
        self.tars = list(tars)
        inputs: list[InputEntry] = describe_inputs(tars)
        super().__init__(path, settings, inputs)

    def shard_path(self, task: int) -> Path:
        """The tar itself."""
        return self.tars[task]

    def _join(self, num_tasks: int, facts: Facts) -> Manifest:
        manifest = super()._join(num_tasks, facts)
        return dataclasses.replace(manifest, layout="pairs", shards_dir=str(self.tars[0].parent))

    def _clean(self) -> None:
        super()._clean()
        with suppress(OSError):
            (self.path / "shards").rmdir()


class PairIndexer:
    """Index of one tar; stands where prepare has a writer of shards."""

    def __init__(self, tar: Path, tokenizer: TextTokenizer, options: IndexOptions) -> None:
        self.rejects: Counter[str] = Counter()
        """Pairs left out, by reason."""
        self.metas: list[Meta] = []
        """What is known of each pair besides."""
        self.uses_template = False
        """The index keeps no rendered question."""
        self._tar = tar
        self._tokenizer = tokenizer
        self._options = options
        self._rows: list[tuple[Any, ...]] = []
        self._uids: list[str] = []

    @property
    def num_samples(self) -> int:
        """Pairs so far."""
        return len(self._rows)

    def scan(self) -> None:
        """Reads the tar.

        Raises:
            UserError: It is damaged, or a pair is bad (unless skipped).
        """
        descriptor = os.open(self._tar, os.O_RDONLY)
        try:
            for pair in scan_pairs(self._tar):
                try:
                    self._add(pair, os.pread(descriptor, pair.end - pair.start, pair.start))
                except Reject as reject:
                    if self._options.on_bad is OnBad.error:
                        raise UserError(
                            f"{self._tar}: {pair.key}: {reject}; correct the tar, or pass --on-bad skip to leave such "
                            "out"
                        ) from reject
                    self.rejects[reject.reason] += 1
        finally:
            os.close(descriptor)

    def finish(self) -> np.ndarray:
        """Index rows, ROW_DTYPE [samples]."""
        table = np.array(self._rows, ROW_DTYPE)
        table["uid"] = uid_words(self._uids)
        return table

    def abandon(self) -> None:
        """Nothing has been written."""

    def _add(self, pair: Pair, stretch: bytes) -> None:
        """Adds one pair by the bytes of its members.

        Raises:
            Reject: No picture, no caption, too large, or damaged.
        """
        if pair.picture is None:
            raise Reject("missing_image", "there is no .jpg, .jpeg, .png or .webp of this key")
        if pair.picture.size > MAX_PICTURE_BYTES or len(stretch) >= 1 << 32:
            raise Reject("too_large", f"{pair.picture.name!r} has {pair.picture.size} bytes")
        picture = _content(pair, pair.picture, stretch)
        size = _checked_size(pair.picture.name, picture)
        try:
            facts = parse_facts(_content(pair, pair.facts, stretch)) if pair.facts else {}
            caption = pair_caption(_content(pair, pair.text, stretch) if pair.text else None, facts)
        except ValueError as error:
            raise Reject("bad_record", str(error)) from error
        num_tokens = len(self._tokenizer.encode(pair_text(caption)))
        self.metas.append(sample_meta(facts, self._options.keep_columns, size=size, caption=caption))
        self._uids.append(uid_text(pair_identity(self._tar, pair.key, facts)))
        counts = (num_tokens, 1, 0)
        self._rows.append((pair.start, len(stretch), *counts, zlib.crc32(stretch), (0, 0), 0, 0))


def _content(pair: Pair, member: Any, stretch: bytes) -> bytes:
    """One member out of the bytes of its pair."""
    start = member.data - pair.start
    return stretch[start : start + member.size]


def _checked_size(name: str, picture: bytes) -> tuple[int, int]:
    """Width and height from the header.

    Raises:
        Reject: No picture, or too many pixels.
    """
    try:
        width, height = picture_size(picture)
    except ImageError as error:
        raise Reject("undecodable_image", f"{name!r} is no usable picture: {error}") from error
    if width * height > MAX_PIXELS or width < 1 or height < 1:
        raise Reject("too_many_pixels", f"{name!r} has {width} x {height} pixels, at most {MAX_PIXELS} are allowed")
    return width, height


def _do(
    directory: TarsInPlace,
    todo: Sequence[int],
    tokenizer: TextTokenizer,
    options: IndexOptions,
    reach: Callable[[int], None],
) -> None:
    """Indexes tars, here or in processes of their own."""
    workers = min(options.workers, len(todo))
    if workers <= 1:
        for done, task in enumerate(todo, start=1):
            _index_one(directory, task, tokenizer, options)
            reach(done)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_index_one, directory, task, tokenizer, options) for task in todo]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                reach(done)
        except BrokenProcessPool as error:
            raise UserError(
                f"{directory.path}: a worker was killed (out of memory?); run the same command again, with fewer "
                "--workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _index_one(directory: TarsInPlace, task: int, tokenizer: TextTokenizer, options: IndexOptions) -> None:
    indexer = PairIndexer(directory.shard_path(task), tokenizer, options)
    indexer.scan()
    directory.commit(task, indexer)


def _tars_of(inputs: Iterable[str | Path]) -> list[Path]:
    """Absolute paths of the tars, sorted within each directory.

    Raises:
        UserError: None, something else, or tars that do not lie in one directory under names of their own.
    """
    tars: list[Path] = []
    for given in inputs:
        if str(given).startswith("pipe:") or "://" in str(given):
            raise UserError(f"{given}: tars are read from disk, never through a shell or a URL; give files")
        path = Path(given)
        if path.suffix.lstrip(".") in PICKLED_EXTENSIONS:
            raise UserError(f"{path}: pickles are never opened; give tars")
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
            if not found:
                raise UserError(f"{path}: no .tar in this directory; give the directory that holds them")
            tars += found
        elif path.is_file() and path.suffix == ".tar":
            tars.append(path)
        else:
            raise UserError(f"{path}: no such .tar file or directory; check the path")
    tars = [path.absolute() for path in tars]
    if not tars:
        raise UserError("data index: no tar given; name tars or a directory of them")
    other = next((path for path in tars if path.parent != tars[0].parent), None)
    if other is not None:
        raise UserError(
            f"{other}: lies in another directory than {tars[0]}; an index covers the tars of one directory, make one "
            "for each"
        )
    twice = [path for path, count in Counter(tars).items() if count > 1]
    if twice:
        raise UserError(f"{twice[0]}: given twice; name every tar once")
    return tars
