"""Tars of pictures with captions, as img2dataset and open_clip write them.

Facts come from the .json of each picture, or from the .parquet beside the tar where there are none. What img2dataset
could not download has no picture: such a record is rejected as a missing image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.pairs import Pair, pair_caption, pair_identity, parse_facts, scan_pairs
from data_pipeline.prepare.importers.pictures import InTar, read_range
from data_pipeline.prepare.importers.record import Record
from data_pipeline.prepare.records import Reject
from data_pipeline.tar_scan import Member

_FACTS = ("uid", "sha256", "url", "caption", "width", "height", "status", "license", "language")


@dataclass(slots=True)
class PairTar:
    """One tar; it is scanned again for every slice, so that nothing of it stays in memory."""

    path: Path
    keep: tuple[str, ...] = ()
    """Further columns of the .parquet."""
    _count: int = -1

    def files(self) -> list[Path]:
        """See Part."""
        return [self.path]

    def count(self) -> int:
        """See Part."""
        if self._count < 0:
            self._count = sum(1 for _ in scan_pairs(self.path))
        return self._count

    def read(self, start: int, stop: int) -> Iterator[Record]:
        """See Part."""
        beside: dict[str, dict[str, Any]] | None = None
        for pair in islice(scan_pairs(self.path), start, stop):
            if pair.facts is None and beside is None:
                beside = self._facts_beside()
            pictures = InTar(self.path, {m.name: (m.data, m.size) for m in (pair.picture,) if m is not None})
            name = pair_identity(self.path, pair.key, {})
            raw = (pair, (beside or {}).get(pair.key, {}))
            yield Record(f"{self.path}: {pair.key}", name, raw, self._parse, pictures, self.path)

    def _parse(self, raw: tuple[Pair, dict[str, Any]]) -> dict[str, Any]:
        """Caption, name of the picture and facts.

        Raises:
            Reject: No picture, no caption, or a .json that is none.
        """
        pair, facts = raw
        try:
            if pair.facts is not None:
                facts = parse_facts(self._content(pair.facts))
            status = facts.get("status", "success")
            if pair.picture is None:
                raise Reject("missing_image", f"the tar has no picture of this key (status {status!r})")
            caption = pair_caption(self._content(pair.text) if pair.text else None, facts)
        except Reject:
            raise
        except ValueError as error:
            raise Reject("bad_record", str(error)) from error
        identity = pair_identity(self.path, pair.key, facts)
        return {"id": identity, "image": pair.picture.name, "caption": caption, "meta": facts}

    def _content(self, member: Member) -> bytes:
        return read_range(self.path, member.data, member.size, member.name)

    def _facts_beside(self) -> dict[str, dict[str, Any]]:
        """Rows of the .parquet beside the tar, by key."""
        path = self.path.with_suffix(".parquet")
        if not path.is_file():
            return {}
        import pyarrow
        from pyarrow import parquet

        try:
            names = set(parquet.read_schema(path).names)
            columns = [name for name in ("key", *_FACTS, *self.keep) if name in names]
            rows = parquet.read_table(path, columns=columns).to_pylist() if "key" in names else []
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: no readable Parquet file ({error}); remove it or copy it again") from error
        return {str(row["key"]): row for row in rows}
